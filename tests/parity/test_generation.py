"""Generation with exits: as transformers where none is taken, and as without a cache where they are."""

import json
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from offramp import Recipe, Uniform, train  # noqa: E402
from offramp.errors import DataError, ShapeError, ValueRangeError  # noqa: E402
from offramp.generation import (  # noqa: E402
    Draft,
    Sampling,
    TokenPolicy,
    attach_tokens,
    choose_draft,
    decoder_of,
    generate,
    generate_lossless,
    generate_without_cache,
    score,
    search,
    stop_at,
)
from offramp.generation.memory import Memory  # noqa: E402
from offramp.generation.reference import _whole  # noqa: E402
from offramp.generation.rehearsal import rehearsed  # noqa: E402
from offramp.policies import BEEM, Array, Entropy, Fixed, Margin, MaxProb, Patience, Stopping  # noqa: E402
from offramp.tokenrows import TokenRows  # noqa: E402

WORDS, LAYERS = 97, 5
PLAIN = {"vocab_size": WORDS, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, **PLAIN}  # fmt: skip


def gpt2(**more: Any) -> Any:
    config = transformers.GPT2Config(
        n_positions=64, n_embd=32, n_layer=LAYERS, n_head=4, tie_word_embeddings=False, **PLAIN, **more
    )
    return transformers.GPT2LMHeadModel(config)


MAKERS: dict[str, Callable[[], Any]] = {
    "gpt2": gpt2,
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(head_dim=16, **SIZES)),
}
POLICIES = {
    "max-prob": MaxProb(thresholds=(0.5,) * LAYERS),
    "entropy": Entropy(thresholds=(0.5,) * LAYERS),
    "patience": Patience(patience=1),
    "beem": BEEM(weights=(0.6,) * LAYERS, thresholds=(0.4,) * LAYERS),
    "stopping": Stopping(  # leaves where it is sure, and where it was never going to be
        thresholds=0.0, weights=Array(torch.eye(LAYERS) * 0.7 + torch.full((LAYERS, LAYERS), 0.3).tril(-1)),
        biases=Array(torch.zeros(LAYERS, 1)), gates=Array(torch.tensor([[0.3, -2.0, 2.0, 0.1]] * LAYERS)),
    ),
}  # fmt: skip


def loud(network: Any) -> Any:
    """The network with weights so large that its probabilities are far from even."""
    for parameter in network.parameters():
        parameter.data *= 1.0 if parameter.ndim < 2 else 6.0
    getattr(network, "decoder", network).lm_head.weight.data *= 4.0
    return network.eval()


@pytest.fixture(scope="module", params=MAKERS)
def network(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return loud(MAKERS[request.param]())


def prompts(count: int, seed: int = 1) -> list[list[int]]:
    dice = random.Random(seed)
    return [[dice.randrange(WORDS) for _ in range(dice.randint(1, 9))] for _ in range(count)]


def of_transformers(network: Any, given: list[list[int]], new: int, **more: Any) -> list[list[int]]:
    """What transformers generates greedily, with the prompts padded in front."""
    longest = max(map(len, given))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in given])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in given])
    more = {"pad_token_id": 0, "eos_token_id": None, "do_sample": "top_k" in more, **more}
    said = network.generate(ids, attention_mask=mask, max_new_tokens=new, **more)
    return said[:, longest:].tolist()


def beams_without_cache(model: Any, policy: Any, prompt: list[int], beams: int, new: int) -> tuple[Any, Any]:
    """(tokens, exits) of the best of all texts of one length that a beam search follows."""
    rule, ends = TokenPolicy(policy), (*model.at, LAYERS - 1)
    live = [(0.0, (), ())]
    with torch.inference_mode():
        for token in range(new):
            found = []
            for total, tokens, exits in live:
                left = [LAYERS - 1] * (len(prompt) - 1) + [ends[k] for k in exits] + [LAYERS - 1]
                said, exit_, _ = _whole(model, [*prompt, *tokens], left, rule, None, token, new)
                logs = said.log_softmax(-1)
                found += [(total + float(x), (*tokens, i), (*exits, exit_)) for i, x in enumerate(logs)]
            live = sorted(found, key=lambda each: -each[0])[:beams]
    return live[0][1], live[0][2]


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_without_exits_it_is_what_transformers_gives(network: Any, batch: int) -> None:
    given = prompts(batch)
    ours = generate(attach_tokens(network), None, given, max_new_tokens=20)
    assert [list(row) for row in ours.tokens] == of_transformers(network, given, 20)
    assert {exit_ for row in ours.exits for exit_ in row} == {LAYERS - 1}


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_new"])
def test_another_activation_is_taken_as_it_is(activation: str) -> None:
    torch.manual_seed(0)
    network = loud(gpt2(activation_function=activation))
    ours = generate(attach_tokens(network), None, prompts(4), max_new_tokens=20)
    assert [list(row) for row in ours.tokens] == of_transformers(network, prompts(4), 20)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("batch", [1, 4, 16])
def test_with_exits_it_is_what_no_cache_gives(network: Any, batch: int, policy: str) -> None:
    model, given = attach_tokens(network, head="shared"), prompts(batch, seed=2)
    slow = generate_without_cache(model, POLICIES[policy], given, max_new_tokens=12)
    for at_once in (False, True):
        fast = generate(model, POLICIES[policy], given, max_new_tokens=12, at_once=at_once)
        assert fast.tokens == slow.tokens
        assert fast.exits == slow.exits


def test_the_policies_above_do_leave_at_several_layers(network: Any) -> None:
    model = attach_tokens(network, head="shared")
    for name, policy in POLICIES.items():
        said = generate(model, policy, prompts(16, seed=2), max_new_tokens=12)
        assert len({exit_ for row in said.exits for exit_ in row}) >= 3, name


def test_exits_behind_some_layers_and_exits_that_are_off() -> None:
    torch.manual_seed(0)
    model = attach_tokens(loud(gpt2()), at=(1, 3), head="shared")
    policy = MaxProb(thresholds=(0.4, 0.4, 0.0), enabled=(False, True, True))
    fast = generate(model, policy, prompts(4), max_new_tokens=12)
    assert fast.tokens == generate_without_cache(model, policy, prompts(4), max_new_tokens=12).tokens
    assert {exit_ for row in fast.exits for exit_ in row} == {1, 2}


RULES = {
    "decay": TokenPolicy(MaxProb(thresholds=(0.7,) * LAYERS), decay=4.0),
    "least": TokenPolicy(POLICIES["beem"], least=2),
    "gate": TokenPolicy(POLICIES["beem"], gate=0.5),
}


@pytest.mark.parametrize("rule", RULES)
def test_rules_for_tokens_are_what_no_cache_gives(network: Any, rule: str) -> None:
    model, given = attach_tokens(network, head="shared"), prompts(16, seed=2)
    model.gates = torch.nn.ModuleList(torch.nn.Linear(32, 1) for _ in model.at)
    slow = generate_without_cache(model, RULES[rule], given, max_new_tokens=12)
    fast = generate(model, RULES[rule], given, max_new_tokens=12)
    assert (fast.tokens, fast.exits) == (slow.tokens, slow.exits)
    assert fast.exits != generate(model, RULES[rule].policy, given, max_new_tokens=12).exits


@pytest.mark.parametrize("behind", [0, 2])
def test_layers_that_no_token_comes_to_do_not_read_the_prompts(network: Any, behind: int) -> None:
    model = attach_tokens(network, tuple(range(LAYERS - 1)))
    ran = list[tuple[int, int]]()
    layer = model.decoder.layer
    model.decoder.layer = lambda j, hidden, *other: ran.append((j, hidden.shape[1])) or layer(j, hidden, *other)
    given, longest = prompts(3), max(map(len, prompts(3)))
    said = generate(model, TokenPolicy(Fixed(behind, LAYERS)), given, max_new_tokens=3)
    assert said.exits == ((behind,) * 3,) * 3
    assert {j for j, _ in ran} == set(range(behind + 1))
    assert [j for j, tokens in ran if tokens == longest - 1] == list(range(behind + 1))  # each once


def test_thresholds_that_decay() -> None:
    rule = TokenPolicy(Margin(thresholds=(0.5, 1.0)), decay=4.0)
    assert rule.at(0, 10).thresholds == pytest.approx((0.55, 1.0))
    assert rule.at(10, 10).thresholds == pytest.approx((0.45 + 0.1 * math.exp(-4), 0.9 + 0.1 * math.exp(-4)))
    assert TokenPolicy.from_dict(json.loads(json.dumps(rule.to_dict()))) == rule
    with pytest.raises(ValueRangeError, match="BEEM cannot decay"):
        TokenPolicy(POLICIES["beem"], decay=1.0)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.6, "temperature": 1.5}])
def test_draws_are_those_of_transformers(network: Any, batch: int, options: dict[str, Any]) -> None:
    given = prompts(batch)
    ours = generate(attach_tokens(network), None, given, max_new_tokens=12, choose=Sampling(**options, seed=3))
    torch.manual_seed(3)
    assert [list(row) for row in ours.tokens] == of_transformers(network, given, 12, **{"top_k": 0, **options})
    assert ours.tokens != generate(attach_tokens(network), None, given, max_new_tokens=12).tokens


@pytest.mark.parametrize("end", [None, 11])
def test_beams_are_those_of_transformers(network: Any, end: int | None) -> None:
    given = prompts(4, seed=5)
    ours = search(attach_tokens(network), None, given, beams=3, max_new_tokens=10, end=end, length_penalty=0.7)
    theirs = of_transformers(network, given, 10, num_beams=3, eos_token_id=end, length_penalty=0.7)
    for mine, row in zip(ours.tokens, theirs, strict=True):
        assert list(mine) == row[: len(mine)]
        assert set(row[len(mine) :]) <= {0}


def test_beams_that_leave_are_those_without_a_cache(network: Any) -> None:
    """Beam search with everything computed anew, over texts whose tokens leave where they do."""
    model, given, policy = attach_tokens(network, head="shared"), prompts(3, seed=6), POLICIES["beem"]
    ours = search(model, policy, given, beams=3, max_new_tokens=6)
    assert {exit_ for row in ours.exits for exit_ in row} != {LAYERS - 1}
    for row, prompt in enumerate(given):
        tokens, exits = beams_without_cache(model, policy, prompt, 3, 6)
        assert ours.tokens[row] == tokens
        assert ours.exits[row] == exits


def test_one_beam_is_greedy_and_sampling_leaves_too(network: Any) -> None:
    model, given = attach_tokens(network, head="shared"), prompts(4, seed=2)
    greedy = generate(model, POLICIES["max-prob"], given, max_new_tokens=12)
    one = search(model, POLICIES["max-prob"], given, beams=1, max_new_tokens=12)
    assert (one.tokens, one.exits) == (greedy.tokens, greedy.exits)
    drawn = generate(model, POLICIES["max-prob"], given, max_new_tokens=12, choose=Sampling(temperature=0.5))
    assert drawn.tokens != greedy.tokens
    assert len({exit_ for row in drawn.exits for exit_ in row}) > 1


@pytest.mark.parametrize("draft", [Draft(0, 1), Draft(2, 4), Draft(3, 3, sure=0.6), Draft(1, 30)])
@pytest.mark.parametrize("end", [None, 11])
def test_drafts_that_are_checked_give_the_whole_decoders_text(network: Any, draft: Draft, end: int | None) -> None:
    model, given = attach_tokens(network, head="shared"), prompts(16, seed=4)
    plain = generate(model, None, given, max_new_tokens=20, end=end)
    found = generate_lossless(model, draft, given, max_new_tokens=20, end=end)
    assert found.tokens == plain.tokens
    assert 0 < found.kept < found.drafted
    passes = sum(found.checks)
    assert found.kept + passes >= sum(map(len, plain.tokens)) - len(given)  # every pass gives one token besides


def test_a_draft_that_pays_is_found_by_measuring() -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_positions=64, n_embd=32, n_layer=2, n_head=4, **PLAIN)
    model = attach_tokens(transformers.GPT2LMHeadModel(config), head="shared")
    drafts = [Draft(0, 2), Draft(0, 4)]
    times = choose_draft(model, prompts(2), max_new_tokens=8, drafts=drafts, rounds=2)
    assert {draft for draft, _ in times.drafts} == set(drafts)
    assert (times.best is None) == (times.speedup <= 1)
    with pytest.raises(ValueRangeError, match="of exit 1; expected one before the last, 0 to 0"):
        generate_lossless(model, Draft(1), prompts(1))
    with pytest.raises(ValueRangeError, match="there is no draft to try"):
        choose_draft(model, prompts(1), drafts=[])


class Letters:
    """A tokenizer of which every token is a letter and its number."""

    def decode(self, tokens: list[int]) -> str:
        return "".join(f"a{token}." for token in tokens)


def test_texts_stop_at_strings_and_are_streamed(network: Any) -> None:
    model, given = attach_tokens(network, head="shared"), prompts(4, seed=2)
    whole = generate(model, POLICIES["beem"], given, max_new_tokens=12)
    third = f"a{whole.tokens[1][2]}.a{whole.tokens[1][3]}."
    seen: list[tuple[int, int, int]] = []
    said = generate(
        model, POLICIES["beem"], given, max_new_tokens=12, stop=stop_at(Letters(), [third]),
        stream=lambda *told: seen.append(told),
    )  # fmt: skip
    assert len(said.tokens[1]) == 1 + next(
        i for i in range(4) if third in Letters().decode(list(whole.tokens[1][: i + 1]))
    )
    for row in range(4):
        assert said.tokens[row] == whole.tokens[row][: len(said.tokens[row])]
        assert [t[1:] for t in seen if t[0] == row] == list(zip(said.tokens[row], said.exits[row], strict=True))
    with pytest.raises(ValueRangeError, match="stop strings are \\['']"):
        stop_at(Letters(), [""])


@pytest.mark.parametrize("head", ["factorised", "full", "shared"])
def test_heads_say_a_probability_for_every_token(head: str) -> None:
    torch.manual_seed(0)
    model = attach_tokens(gpt2(), head=head, rank=8)
    assert model.said(0, torch.randn(3, 32)).shape == (3, WORDS)
    assert model.exits == LAYERS
    assert (sum(p.numel() for p in model.heads.parameters()) == 0) == (head == "shared")


def test_a_decoder_that_looks_at_an_image() -> None:
    torch.manual_seed(0)
    vit = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=8
    )
    encoder = transformers.ViTModel(vit, add_pooling_layer=False)
    network = transformers.VisionEncoderDecoderModel(encoder=encoder, decoder=gpt2(add_cross_attention=True))
    network = loud(network)
    network.generation_config.decoder_start_token_id = network.config.decoder_start_token_id = 1
    pixels = torch.randn(6, 3, 16, 16)
    encoded = network.encoder(pixels).last_hidden_state.detach()
    model = attach_tokens(network.decoder, head="shared")
    plain = generate(model, None, [[1]] * 6, max_new_tokens=12, encoded=encoded)
    said = network.generate(pixels, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert [list(row) for row in plain.tokens] == said[:, 1:].tolist()
    assert len(set(plain.tokens)) > 1
    whole = attach_tokens(network, head="shared").eval()
    rows = TokenRows([[1, 5, 7], [1, 9]], images=torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    batch = rows.batch(torch.arange(2))
    torch.testing.assert_close(whole.encode(pixels), encoded)
    with torch.no_grad():
        wanted = network(pixel_values=batch.inputs["pixel_values"], decoder_input_ids=batch.inputs["input_ids"]).logits
        torch.testing.assert_close(whole(batch.inputs)[-1], wanted[:, :-1][batch.labels >= 0], rtol=1e-4, atol=1e-3)
    policy = POLICIES["max-prob"]
    fast = generate(model, policy, [[1]] * 6, max_new_tokens=12, encoded=encoded)
    slow = generate_without_cache(model, policy, [[1]] * 6, max_new_tokens=12, encoded=encoded)
    assert (fast.tokens, fast.exits) == (slow.tokens, slow.exits)
    assert len({exit_ for row in fast.exits for exit_ in row}) > 1


def test_what_an_image_gives_is_made_once_for_each_row_that_asks() -> None:
    made: list[list[float]] = []

    def make(j: int, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        made.append(states[:, 0, 0].tolist())
        return states[:, None] + j, states[:, None] * 2

    encoded = torch.arange(4.0)[:, None, None].repeat(1, 3, 2)
    memory = Memory(make, encoded)
    for rows in ([2], [1, 2], [2, 1, 2], [0, 1, 2, 3]):
        keys, values = memory.of(rows)[5]
        torch.testing.assert_close(keys, encoded[rows][:, None] + 5)
        torch.testing.assert_close(values, encoded[rows][:, None] * 2)
    assert made == [[2.0], [1.0], [0.0, 3.0]]


def swin() -> Any:
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=4, num_labels=2
    )
    return transformers.SwinModel(config, add_pooling_layer=False)


def deit() -> Any:
    config = transformers.DeiTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8
    )
    return transformers.DeiTModel(config, add_pooling_layer=False)


@pytest.mark.parametrize("encoder", [swin, deit])
def test_encoders_that_are_wider_or_narrower(encoder: Callable[[], Any]) -> None:
    """Swin and GPT-2, as BEEM's captioner has them, in small; exits learn through the encoder."""
    torch.manual_seed(0)
    network = transformers.VisionEncoderDecoderModel(encoder=encoder(), decoder=gpt2(add_cross_attention=True))
    network = loud(network)
    network.generation_config.decoder_start_token_id = network.config.decoder_start_token_id = 1
    pixels = torch.randn(5, 3, 32, 32)
    model = attach_tokens(network, at=(1, 3), head="full")
    with torch.inference_mode():
        encoded = model.encode(pixels)
    assert encoded.shape[2] == 32
    ours = generate(model, None, [[1]] * 5, max_new_tokens=10, encoded=encoded)
    said = network.generate(pixels, max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert [list(row) for row in ours.tokens] == said[:, 1:].tolist()
    policy = MaxProb(thresholds=(0.3, 0.3, 0.0))
    fast = generate(model, policy, [[1]] * 5, max_new_tokens=10, encoded=encoded)
    slow = generate_without_cache(model, policy, [[1]] * 5, max_new_tokens=10, encoded=encoded)
    assert (fast.tokens, fast.exits) == (slow.tokens, slow.exits)
    rows = TokenRows([[1, 5, 7, 2], [1, 9, 3]] * 4, images=torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8))
    before = network.encoder.get_input_embeddings().projection.weight.clone()
    report = train(model, rows, objective=Uniform(), recipe=Recipe(epochs=1, batch_size=4, lr=1e-3), progress=False)
    assert report.loss > 0
    assert not torch.equal(network.encoder.get_input_embeddings().projection.weight, before)


def test_the_score_of_what_was_generated_is_that_of_its_own_exits(network: Any) -> None:
    model, given = attach_tokens(network, head="shared"), prompts(4, seed=3)
    given = [prompt[:2] * 2 for prompt in given]
    given = [(prompt * 3)[:3] for prompt in given]
    policy = POLICIES["max-prob"]
    said = generate(model, policy, given, max_new_tokens=8)
    whole = [[*prompt, *tokens] for prompt, tokens in zip(given, said.tokens, strict=True)]
    scored = score(model, policy, whole, given=3)
    assert scored.exits == said.exits
    plain = score(model, None, whole, given=3)
    with torch.no_grad():
        logits = network(torch.tensor(whole)).logits[:, 2:-1].log_softmax(-1)
    wanted = -logits.gather(2, torch.tensor(whole)[:, 3:, None])[:, :, 0]
    torch.testing.assert_close(torch.tensor(plain.losses), wanted, rtol=1e-3, atol=1e-4)
    assert plain.perplexity == pytest.approx(float(wanted.mean().exp()), rel=1e-3)
    with pytest.raises(ValueRangeError, match="more than given=3"):
        score(model, None, [[1, 2, 3]], given=3)


def test_a_decoder_learns_with_its_exits() -> None:
    torch.manual_seed(0)
    dice = random.Random(0)

    def counted(rows: int) -> TokenRows:
        starts = [dice.randrange(WORDS) for _ in range(rows)]
        return TokenRows([[(s + i) % WORDS for i in range(dice.randint(4, 9))] for s in starts])

    model, rows = attach_tokens(gpt2(), rank=16), counted(300)
    recipe = Recipe(epochs=8, batch_size=32, lr=1e-2)
    train(model, rows, objective=Uniform(), recipe=recipe, progress=False)
    batch = counted(40).batch(torch.arange(40))
    with torch.no_grad():
        logits = model.eval()(batch.inputs)
    labels = batch.labels[batch.labels >= 0]
    assert logits.shape == (LAYERS, len(labels), WORDS)
    assert ((logits.argmax(-1) == labels).double().mean(1) > 0.5).all()
    torch.testing.assert_close(model.plain(batch.inputs), logits[-1])
    before = [p.clone() for p in model.backbone.parameters()]
    train(model, rows, objective=Uniform(), recipe=Recipe(epochs=1, frozen="backbone"), progress=False)
    assert all(torch.equal(a, b) for a, b in zip(before, model.backbone.parameters(), strict=True))


def test_rows_of_tokens_that_do_not_fit_are_said() -> None:
    with pytest.raises(DataError, match="no sequences"):
        TokenRows([])
    with pytest.raises(DataError, match="sequence 1 has 1 tokens"):
        TokenRows([[1, 2], [1]])
    with pytest.raises(ShapeError, match="do not fit"):
        TokenRows([[1, 2], [1, 3]], images=torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    rows = TokenRows([[1, 2, 3], [4, 5]], images=torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    batch = rows.batch(torch.tensor([0, 1]))
    assert batch.labels.tolist() == [[2, 3], [5, -100]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.inputs["pixel_values"].shape == (2, 3, 4, 4)
    assert rows.tokens == 3
    assert rows.select(torch.tensor([1])).row(0) == [4, 5]
    assert rows.fingerprint() != TokenRows([[1, 2, 3], [4, 6]], images=rows.images).fingerprint()


def test_rows_end_at_their_end_token_and_the_others_go_on(network: Any) -> None:
    model, given = attach_tokens(network, head="shared"), prompts(4)
    free = generate(model, None, given, max_new_tokens=12)
    end = free.tokens[0][3]
    ended = generate(model, None, given, max_new_tokens=12, end=end)
    for row, whole in zip(ended.tokens, free.tokens, strict=True):
        stop = whole.index(end) + 1 if end in whole else 12
        assert row == whole[:stop]


def test_the_network_keeps_its_mode() -> None:
    torch.manual_seed(0)
    network = gpt2().eval()
    network.transformer.h[1].train()
    generate(attach_tokens(network), None, [[1]], max_new_tokens=2)
    assert network.transformer.h[1].training
    assert not network.transformer.h[0].training


def test_what_cannot_be_generated_is_said() -> None:
    torch.manual_seed(0)
    model = attach_tokens(gpt2())
    for given, why in (([], "0 prompts"), ([[1], []], "shortest of 0 tokens"), ([[WORDS]], "not in 0 to 96"),
                       ([[1] * 60], "room for 64")):  # fmt: skip
        with pytest.raises(ValueRangeError, match=why):
            generate(model, None, given, max_new_tokens=10)
    with pytest.raises(ValueRangeError, match="expected at least 1"):
        generate(model, None, [[1]], max_new_tokens=0)
    with pytest.raises(ShapeError, match="there are 5 exits"):
        generate(model, MaxProb(thresholds=(0.5,) * 3), [[1]])
    with pytest.raises(ValueRangeError, match="expected rising numbers from 0 to 3"):
        attach_tokens(gpt2(), at=(1, 4))
    with pytest.raises(ValueRangeError, match="factorised, full, shared"):
        attach_tokens(gpt2(), head="big")
    with pytest.raises(ValueRangeError, match="rank is 99"):
        attach_tokens(gpt2(), rank=99)
    bert = transformers.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    with pytest.raises(ValueRangeError, match="kind 'bert'.*expected .* gpt2, llama, mistral, qwen2, qwen3"):
        decoder_of(transformers.BertForSequenceClassification(bert))
    with pytest.raises(ValueRangeError, match="has no encoder, so it takes no images"):
        model.encode(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueRangeError, match="no cross-attention"):
        generate(model, None, [[1]], encoded=torch.zeros(1, 3, 32))


@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.7, 2.0])
def test_a_rehearsal_is_what_generation_leaves_behind(network: Any, threshold: float) -> None:
    model = attach_tokens(network, at=(0, 2, 3)).eval()
    rows = TokenRows([row for row in prompts(12, seed=5) if len(row) > 1], pad=0)
    batch = rows.batch(torch.arange(len(rows)))
    with torch.no_grad():
        said = rehearsed(model, batch.inputs, torch.full((len(rows),), threshold)).log_softmax(-1)
        whole = model(batch.inputs).log_softmax(-1)
    stops = said.exp().amax(-1) >= threshold
    stops[-1] = True
    exits = stops.int().argmax(0)
    labels = batch.labels[batch.labels >= 0]
    losses = -said[exits, torch.arange(len(labels)), labels]
    live = score(model, MaxProb((threshold,) * 4), [rows.row(i) for i in range(len(rows))])
    assert exits.tolist() == [k for row in live.exits for k in row]
    torch.testing.assert_close(losses, torch.tensor([x for row in live.losses for x in row]), atol=1e-4, rtol=1e-4)
    if threshold > 1:
        torch.testing.assert_close(said, whole, atol=1e-4, rtol=1e-4)
    elif threshold == 0.0:
        assert not torch.allclose(said[-1], whole[-1], atol=1e-2)


def test_training_rehearses_unless_told_otherwise(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offramp.generation.rehearsal.DEPTH", 0.0)  # so every token leaves at the first exit
    model = attach_tokens(network, at=(0, 2, 3)).eval()
    rows = TokenRows([row for row in prompts(12, seed=5) if len(row) > 1], pad=0)
    inputs = rows.batch(torch.arange(len(rows))).inputs
    with torch.no_grad():
        whole, left = model(inputs), rehearsed(model, inputs, torch.zeros(len(rows)))
        model.train().backbone.eval()  # as while heads learn alone: no dropout
        torch.testing.assert_close(model(inputs), left, atol=1e-4, rtol=1e-4)
        model.rehearse = False
        torch.testing.assert_close(model(inputs), whole, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(left[-1], whole[-1], atol=1e-2)
