"""What generation is given: shapes, precisions, ends, and neighbours."""

import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from offramp import Recipe, train  # noqa: E402
from offramp.errors import DataError, ShapeError, ValueRangeError  # noqa: E402
from offramp.generation import (  # noqa: E402
    Changed,
    Draft,
    Sampling,
    TokenPolicy,
    attach_tokens,
    caption_scores,
    certify_texts,
    choose_draft,
    generate,
    generate_lossless,
    generate_without_cache,
    learn_gates,
    record_tokens,
    score,
    search,
)
from offramp.policies import MaxProb  # noqa: E402
from offramp.tokenrows import TokenRows  # noqa: E402

WORDS, LAYERS = 61, 4
SIZES = {"bos_token_id": None, "eos_token_id": None, "vocab_size": WORDS}


def gpt2(**more: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_positions=64, n_embd=32, n_layer=LAYERS, n_head=4, **SIZES, **more)
    network = transformers.GPT2LMHeadModel(config).eval()
    for parameter in network.parameters():
        parameter.data *= 1.0 if parameter.ndim < 2 else 6.0
    return network


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        max_position_embeddings=64, **SIZES, **more,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def small() -> Any:
    return attach_tokens(gpt2(), at=(0, 2), head="shared")


POLICY = MaxProb((0.4, 0.4, 0.0))
PROMPTS = [[3, 5, 8], [7], [2, 9, 4, 1, 6]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("head", ["factorised", "full", "shortlist"])
def test_heads_and_gates_are_as_precise_as_the_decoder(dtype: torch.dtype, head: str) -> None:
    listed = torch.arange(20) if head == "shortlist" else None
    model = attach_tokens(llama().to(dtype), at=(0, 2), head=head, shortlist=listed)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    rows = TokenRows([[*row, 1, 2] for row in PROMPTS] * 8)
    record_tokens(model, rows, progress=False)
    model.gates = torch.nn.ModuleList(torch.nn.Linear(32, 1) for _ in model.at).to(dtype)
    said = generate(model, TokenPolicy(POLICY, gate=0.2), PROMPTS, max_new_tokens=6)
    assert all(len(row) == 6 for row in said.tokens)


def test_gates_learned_are_where_the_decoder_is() -> None:
    model = attach_tokens(gpt2().double(), at=(0, 2), head="shared")
    learn_gates(model, TokenRows([[*row, 1, 2, 3] for row in PROMPTS] * 20), progress=False)
    assert model.gates is not None
    assert {parameter.dtype for parameter in model.gates.parameters()} == {torch.float64}
    generate(model, TokenPolicy(POLICY, gate=0.5), PROMPTS, max_new_tokens=3)


def test_several_tokens_may_end_a_row() -> None:
    model = small()
    whole = generate(model, POLICY, PROMPTS, max_new_tokens=12)
    ends = [whole.tokens[0][4], whole.tokens[1][2]]
    said = generate(model, POLICY, PROMPTS, max_new_tokens=12, end=ends)
    for row, all_of_it in zip(said.tokens, whole.tokens, strict=True):
        first = min([all_of_it.index(end) + 1 for end in ends if end in all_of_it], default=12)
        assert row == all_of_it[:first]
    assert generate_without_cache(model, POLICY, PROMPTS, max_new_tokens=12, end=ends).tokens == said.tokens
    plain = generate(model, None, PROMPTS, max_new_tokens=12, end=ends)
    assert generate_lossless(model, Draft(1), PROMPTS, max_new_tokens=12, end=ends).tokens == plain.tokens
    assert search(model, None, PROMPTS, beams=1, max_new_tokens=12, end=ends).tokens == plain.tokens


#: what a user sees without the tests' own checks of types: a call, and what is said of it
CALLS = {
    "generate(model, policy, [1, 2, 3])": "ShapeError: prompts are list [1, 2, 3]; expected a list of token numbers",
    "generate(model, policy, ['hello'])": "ShapeError: prompts are list ['hello']",
    "generate(model, policy, [[1.0, 2.5]])": "ShapeError: prompts are list [[1.0, 2.5]]",
    "generate(model, policy, None)": "ShapeError: prompts are NoneType None",
    "generate(model, policy, [[1]], end='</s>')": "ValueRangeError: end is '</s>'; expected the number of a token",
    "generate(model, policy, [[1]], end=[1, 2.5])": "ValueRangeError: end is [1, 2.5]",
    "generate(model, policy, [[1]], choose='sample')": "ValueRangeError: choose is 'sample'",
    "generate(model, policy, [[1]], max_new_tokens=2.0)": "ValueRangeError: max_new_tokens is 2.0",
    "generate(model, 'own', [[1]])": "ValueRangeError: the policy is 'own'",
    "generate(seeing, policy, [[0]], encoded=torch.zeros(4, 16))": "ShapeError: encoded is [4, 16]; expected [1 mem",
    "generate(seeing, policy, [[0]], encoded='a.png')": "ShapeError: encoded is str",
    "attach_tokens(network, at=1)": "ValueRangeError: exits are wanted behind 1; expected layers such as (1,)",
    "Changed('a')": "ValueRangeError: epsilon is 'a'",
    "TokenRows(['abc'])": "DataError: sequences are not all of token numbers",
    "caption_scores([['a']], [None])": "DataError: captions and references have something that is no text",
}
SCRIPT = """
import sys, numpy, torch, transformers
from offramp.errors import OfframpError
from offramp.generation import *
from offramp.policies import MaxProb
from offramp.tokenrows import TokenRows
def made(**more):
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_positions=64, n_embd=16, n_layer=3, n_head=2, vocab_size=61, bos_token_id=None, eos_token_id=None, **more))
network = made()
model, seeing = attach_tokens(network), attach_tokens(made(add_cross_attention=True))
policy = MaxProb((0.02, 0.02, 0.0))
plain = generate(model, policy, [[3, 5], [8, 1]], max_new_tokens=5).tokens
for given in (torch.tensor([[3, 5], [8, 1]]), numpy.array([[3, 5], [8, 1]]), ((3, 5), (8, 1))):
    assert generate(model, policy, given, max_new_tokens=5).tokens == plain
for call in sys.argv[1:]:
    try:
        print(eval(call))
    except OfframpError as error:
        print(f"{type(error).__name__}: {error}")
"""


def test_what_is_asked_wrongly_is_said_to_a_user() -> None:
    calls = {call: said for call, said in CALLS.items() if "scores" not in call or find_spec("pycocoevalcap")}
    found = subprocess.run([sys.executable, "-c", SCRIPT, *calls], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    for line, (call, said) in zip(found.stdout.splitlines(), calls.items(), strict=True):
        assert line.startswith(said), call


def test_numbers_out_of_range_are_said() -> None:
    model, rows = small(), TokenRows([[1, 2, 3]])
    for end in (WORDS, -1, [1, WORDS]):
        with pytest.raises(ValueRangeError, match="expected the number of a token, or of several, from 0 to 60"):
            generate(model, None, PROMPTS, max_new_tokens=3, end=end)
    with pytest.raises(ValueRangeError, match="of top at most the vocabulary, 61"):
        record_tokens(model, rows, top=100)
    with pytest.raises(DataError, match="or no prompts"):
        certify_texts(model, [POLICY], [], Changed(0.1))
    for epsilon in (2.0, -1.0, 0.0):
        with pytest.raises(ValueRangeError, match="expected a share of texts"):
            Changed(epsilon)
    with pytest.raises(ValueRangeError, match="there are 0 prompts"):
        choose_draft(model, [])
    with pytest.raises(ValueRangeError, match="rounds is 0"):
        choose_draft(model, PROMPTS, rounds=0)
    rope = {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 16, "rope_theta": 10000.0}  # fmt: skip
    network = llama(rope_parameters=rope)
    with pytest.raises(ValueRangeError, match="rotary positions of the type 'longrope'"):
        attach_tokens(network)


def test_references_without_a_word() -> None:
    pytest.importorskip("pycocoevalcap")
    with pytest.raises(DataError, match="no reference has a word"):
        caption_scores([["!"]], ["a"])


@pytest.mark.parametrize("network", [gpt2, llama])
def test_rows_that_do_not_fit_the_decoder(network: Any) -> None:
    model = attach_tokens(network(), at=(0, 2))
    long, unknown = TokenRows([[1] * 80, [1, 2]]), TokenRows([[1, WORDS]])
    recipe = Recipe(epochs=1, batch_size=2)
    for rows, why in ((long, "a row has 80 tokens; the decoder has room for 64"), (unknown, "0 to 60")):
        with pytest.raises(ValueRangeError, match=why):
            record_tokens(model, rows, progress=False)
        with pytest.raises(ValueRangeError, match=why):
            train(model, rows, recipe=recipe, progress=False)


def test_states_of_an_encoder_are_one_for_each_text() -> None:
    encoder = transformers.ViTModel(
        transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32,
                               image_size=16, patch_size=8), add_pooling_layer=False,
    )  # fmt: skip
    network = transformers.VisionEncoderDecoderModel(encoder=encoder, decoder=gpt2(add_cross_attention=True))
    model = attach_tokens(network, at=(0, 2), head="shared").eval()
    with torch.inference_mode():
        encoded = model.encode(torch.randn(4, 3, 16, 16))
    plain = generate(model, POLICY, [[0]] * 4, max_new_tokens=4, encoded=encoded).tokens
    assert generate(model, POLICY, [[0]] * 4, max_new_tokens=4, encoded=encoded.double()).tokens == plain
    calls = (
        lambda given: generate(model, POLICY, [[0]] * 4, encoded=given),
        lambda given: generate_lossless(model, Draft(0), [[0]] * 4, encoded=given),
        lambda given: search(model, None, [[0]] * 4, encoded=given),
        lambda given: score(model, None, [[0, 1]] * 4, encoded=given),
    )
    for call in calls:
        for wrong in (encoded[:1], encoded[:, :, :16], torch.cat([encoded] * 2)):
            with pytest.raises(ShapeError, match=r"expected \[4 memory 32\]"):
                call(wrong)
        with pytest.raises(ValueRangeError, match="the model looks at images; give encoded="):
            call(None)
    blind = transformers.VisionEncoderDecoderModel(encoder=encoder, decoder=gpt2(add_cross_attention=True))
    blind.decoder = llama()
    with pytest.raises(ValueRangeError, match="LlamaForCausalLM, which cannot look at an encoder"):
        attach_tokens(blind)


def test_weights_that_are_no_numbers_are_said() -> None:
    model = small()
    model.decoder.blocks[0].mlp.c_fc.weight.data[0, 0] = float("nan")  # type: ignore[union-attr]
    for call in (
        lambda: generate(model, None, PROMPTS), lambda: generate(model, POLICY, PROMPTS),
        lambda: generate(model, POLICY, PROMPTS, choose=Sampling()), lambda: search(model, None, PROMPTS),
        lambda: generate_lossless(model, Draft(0), PROMPTS),
    ):  # fmt: skip
        with pytest.raises(DataError, match="NaN of the first token"):
            call()


def test_penalties_do_not_see_padding() -> None:
    model = small()
    for options in ({"no_repeat_ngram_size": 1}, {"repetition_penalty": 3.0}):
        together = search(model, POLICY, PROMPTS, beams=2, max_new_tokens=12, **options)
        for i, prompt in enumerate(PROMPTS):
            alone = search(model, POLICY, [prompt], beams=2, max_new_tokens=12, **options)
            assert (together.tokens[i], together.exits[i]) == (alone.tokens[0], alone.exits[0])


def test_thresholds_that_decay_fall_over_a_given_length() -> None:
    model = small()
    rule = TokenPolicy(MaxProb((0.5, 0.5, 0.0)), decay=4.0)
    rows = [[4, 7, 2, 5, 3], [6, *range(20)]]
    both = score(model, rule, rows, max_new_tokens=24)
    assert score(model, rule, rows[:1], max_new_tokens=24).exits[0] == both.exits[0]
    with pytest.raises(ValueRangeError, match="a row has 20 tokens to score"):
        score(model, rule, rows, max_new_tokens=10)


def test_draws_in_half_precision_are_those_of_transformers() -> None:
    network = gpt2(activation_function="relu").to(torch.bfloat16)  # our GELU rounds once, theirs eight times
    model = attach_tokens(network, head="shared")
    for seed in range(20):
        ours = generate(model, None, [[3, 5]], max_new_tokens=6, choose=Sampling(temperature=0.8, seed=seed))
        torch.manual_seed(seed)
        said = network.generate(
            torch.tensor([[3, 5]]), attention_mask=torch.ones(1, 2, dtype=torch.long), max_new_tokens=6,
            do_sample=True, temperature=0.8, top_k=0, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        assert list(ours.tokens[0]) == said[0, 2:].tolist()
