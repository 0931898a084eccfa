"""Token traces, gates, shortlists, costs of tokens, and promises over whole texts."""

import random
import shutil
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from offramp import Budget, CostModel, ExitTrace, Joint, Recipe, Risk, Uniform, calibrate, train  # noqa: E402
from offramp.calibrate import Options, calibrate_with  # noqa: E402
from offramp.calibrate.stopping import CANDIDATES, StoppingFit  # noqa: E402
from offramp.errors import DataError, ShapeError, ValueRangeError  # noqa: E402
from offramp.generation import (  # noqa: E402
    Changed,
    MetricDrop,
    TokenPolicy,
    attach_tokens,
    caption_scores,
    certify_texts,
    generate,
    learn_gates,
    measure_tokens,
    record_tokens,
    sequences_of,
)
from offramp.policies import BEEM, ZTW, Array, EENet, Fixed, Margin, MaxProb, Patience, Stopping  # noqa: E402
from offramp.simulate import simulate  # noqa: E402
from offramp.tokenrows import TokenRows, next_tokens  # noqa: E402

WORDS, LAYERS, END = 40, 4, 1


def texts(count: int, seed: int) -> list[list[int]]:
    """Texts of a small grammar: 0, then runs of neighbours, which are easy, each begun at random, which is hard."""
    dice = random.Random(seed)
    made = []
    for _ in range(count):
        row = [0]
        for _ in range(dice.randint(2, 3)):
            first = dice.randrange(2, WORDS - 4)
            row += range(first, first + dice.randint(3, 4))
        made.append([*row, END])
    return made


def stopping(weights: torch.Tensor) -> Stopping:
    gates = Array(torch.tensor([[0.3, -2.0, 2.0, 0.1]] * LAYERS))
    return Stopping(0.0, weights=Array(weights), biases=Array(torch.zeros(LAYERS, 1)), gates=gates)


@cache
def trained() -> tuple[Any, TokenRows, TokenRows]:
    """(a small decoder that has learned the grammar, rows it learned from, others)."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_positions=32, n_embd=32, n_layer=LAYERS, n_head=4, vocab_size=WORDS, bos_token_id=None, eos_token_id=None
    )
    model = attach_tokens(transformers.GPT2LMHeadModel(config), head="factorised", rank=16)
    rows, others = TokenRows(texts(400, 0)), TokenRows(texts(80, 1))
    recipe = Recipe(epochs=4, batch_size=16, lr=3e-3, head_lr=3e-3)
    train(model, rows, objective=Uniform(), recipe=recipe, progress=False)
    return model.eval(), rows, others


def test_a_token_trace_is_what_the_exits_said() -> None:
    model, _, others = trained()
    trace = record_tokens(model, others, progress=False)
    assert trace.rows == others.tokens
    assert len(sequences_of(trace).unique()) == len(others)
    batch = others.batch(torch.arange(len(others)))
    with torch.no_grad():
        said, labels = model(batch.inputs), next_tokens(batch)
    probs, small = said.softmax(-1), trace.logits.softmax(-1)
    top, most = probs.topk(2, dim=-1), small.topk(2, dim=-1)
    torch.testing.assert_close(top.values, most.values, rtol=1e-4, atol=1e-5)
    assert trace.accuracy() == pytest.approx((said.argmax(-1) == labels).double().mean(1).tolist())
    agree = said.argmax(-1)[:, None] == said.argmax(-1)
    assert torch.equal(agree, trace.logits.argmax(-1)[:, None] == trace.logits.argmax(-1))
    with pytest.raises(ValueRangeError, match="top is 0"):
        record_tokens(model, others, top=0)


@pytest.mark.parametrize("policy", [MaxProb((0.6,) * LAYERS), Margin((0.4,) * LAYERS), Patience(1),
                                    BEEM(weights=(0.6,) * LAYERS, thresholds=(0.5,) * LAYERS),
                                    stopping(torch.eye(LAYERS))])  # fmt: skip
def test_policies_decide_alike_on_a_trace_and_on_whole_vocabularies(policy: Any) -> None:
    model, _, others = trained()
    trace = record_tokens(model, others, progress=False)
    with torch.no_grad():
        whole = model(others.batch(torch.arange(len(others))).inputs)
    costs = CostModel.from_costs(tuple((k + 1) / LAYERS for k in range(LAYERS)))
    assert torch.equal(simulate(policy, trace, costs).exit, simulate(policy, ExitTrace(whole), costs).exit)


def test_what_is_fitted_for_tokens_is_not_for_a_number_of_classes() -> None:
    model, _, others = trained()
    trace = record_tokens(model, others, progress=False)
    costs = measure_tokens(model, [others.row(0)[:4]], batch_sizes=())
    assert trace.of_tokens
    assert trace.classes != WORDS
    with torch.no_grad():
        whole = model(others.batch(torch.arange(len(others))).inputs)
    for options in (Options(), *(Options(stopping=StoppingFit(candidates=(each,))) for each in CANDIDATES[:3])):
        policy = calibrate_with(Stopping, trace, costs, Budget(fraction=0.8), options).policy
        small, large = (simulate(policy, each, costs).exit for each in (trace, ExitTrace(whole)))
        assert (small == large).double().mean() > 0.99  # but for rounding
        said = generate(model, policy, [[0], [0, 5]], max_new_tokens=8)
        assert len({k for row in said.exits for k in row}) > 1
        wrong = replace(policy, biases=Array(torch.zeros(LAYERS, 3)))
        with pytest.raises(ShapeError, match="was fitted for 3 classes"):
            generate(model, wrong, [[0]], max_new_tokens=2)


def test_budgets_of_tokens_are_calibrated_like_others() -> None:
    model, _, others = trained()
    trace = record_tokens(model, others, progress=False)
    costs = measure_tokens(model, [others.row(0)[:4]], batch_sizes=(1, 4), rounds=3)
    assert sum(costs.stage) == pytest.approx(1.0)
    assert costs.stage[0] > 1 / LAYERS * 0.5
    assert [each.batch_size for each in costs.timed] == [1, 4]
    assert all(each.plain_s > 0 and len(each.stage_s) == LAYERS for each in costs.timed)
    found = calibrate(MaxProb, trace, costs, Budget(fraction=0.8))
    assert float((simulate(found.policy, trace, costs).exit < LAYERS - 1).float().mean()) > 0.1
    with pytest.raises(ValueRangeError, match="the decoder has room for 32"):
        measure_tokens(model, [others.row(0) + others.row(1) + others.row(2)])


def test_tokens_are_no_rows_that_know_nothing_of_each_other() -> None:
    model, _, others = trained()
    trace = record_tokens(model, others, progress=False)
    costs = measure_tokens(model, [others.row(0)[:4]], batch_sizes=())
    for family in (EENet, ZTW):
        with pytest.raises(ValueRangeError, match=f"{family.__name__} knows classes by their number"):
            calibrate(family, trace, costs, Budget(fraction=0.8))
    for target in (Risk(0.1), Joint(Risk(0.1), Budget(fraction=0.8))):
        with pytest.raises(ValueRangeError, match="promise over whole texts with offramp.generation.certify_texts"):
            calibrate(MaxProb, trace, costs, target)


def test_an_encoders_keys_and_values_are_no_work_of_a_token() -> None:
    def flops(crossed: bool) -> float:
        config = transformers.GPT2Config(
            n_positions=32, n_embd=16, n_layer=4, n_head=2, vocab_size=WORDS, add_cross_attention=crossed
        )
        return measure_tokens(attach_tokens(transformers.GPT2LMHeadModel(config)), [[0]], batch_sizes=()).plain_flops

    # of cross-attention, the query's and the output's 16 x 16 in each of four layers, and no more
    assert flops(True) - flops(False) == 2 * 4 * 2 * 16 * 16


def test_a_gate_spares_vocabularies_and_loses_little() -> None:
    model, rows, others = trained()
    plain = MaxProb((0.9,) * LAYERS)
    with pytest.raises(ShapeError, match="the model has none; learn them with learn_gates"):
        generate(model, TokenPolicy(plain, gate=0.5), [[0]], max_new_tokens=4)
    try:
        right = learn_gates(model, rows, tokens=2000, progress=False)
        assert len(right) == LAYERS - 1
        with torch.inference_mode():
            hidden, last = model.states(others.batch(torch.arange(len(others))).inputs)
            for k, (state, head) in enumerate(zip(hidden, model.heads, strict=True)):
                agrees = head(state).argmax(-1) == last.argmax(-1)
                opened = torch.tensor(model.opened(k, state, TokenPolicy(plain, gate=0.5)))
                base = max(float(agrees.float().mean()), 1 - float(agrees.float().mean()))
                assert float((opened == agrees).float().mean()) > base - 0.02
        shut = generate(model, TokenPolicy(plain, gate=1.0), [[0]] * 4, max_new_tokens=8)
        assert {exit_ for row in shut.exits for exit_ in row} == {LAYERS - 1}
        open_ = generate(model, TokenPolicy(plain, gate=0.0), [[0]] * 4, max_new_tokens=8)
        assert open_.exits == generate(model, plain, [[0]] * 4, max_new_tokens=8).exits
    finally:
        model.gates = None


def test_a_shortlist_says_its_tokens_and_leaves_others_to_later_exits() -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_positions=32, n_embd=16, n_layer=2, n_head=2, vocab_size=WORDS)
    network = transformers.GPT2LMHeadModel(config)
    model = attach_tokens(network, head="shortlist", shortlist=torch.tensor([3, 5, 8]))
    said = model.said(0, torch.randn(6, 16)).softmax(-1)
    others = [i for i in range(WORDS) if i not in (3, 5, 8)]
    torch.testing.assert_close(said[:, others], said[:, others[:1]].expand(-1, len(others)))
    torch.testing.assert_close(said.sum(-1), torch.ones(6))
    with pytest.raises(ValueRangeError, match="a shortlist is not given; expected both or neither"):
        attach_tokens(network, head="shortlist")
    with pytest.raises(ValueRangeError, match="the shortlist has 1 tokens; expected 1 to 39 of the numbers 0 to 39"):
        attach_tokens(network, head="shortlist", shortlist=torch.tensor([40]))


def test_the_boldest_policy_that_keeps_a_promise_over_texts() -> None:
    model, _, others = trained()
    given = [others.row(i)[:1] + others.row(i)[1:3] for i in range(len(others))]
    rungs = [MaxProb((t,) * LAYERS) for t in (1.1, 0.99, 0.9, 0.5, 0.0)]
    found = certify_texts(model, rungs, given, Changed(0.3), delta=0.1, max_new_tokens=12, end=END, progress=False)
    assert found.tried[0].loss == 0
    assert found.tried[0].depth == LAYERS - 1
    assert found.policy is not None
    assert found.promise is not None
    assert found.promise.observed <= 0.3
    assert found.promise.bound is not None
    assert found.promise.bound <= 0.3 + 1e-6
    assert found.tried[-1].p > 0.1 or len(found.tried) == len(rungs)
    whole = generate(model, None, given, max_new_tokens=12, end=END).tokens
    early = generate(model, found.policy, given, max_new_tokens=12, end=END).tokens
    assert float(Changed(0.3)(whole, early).mean()) == pytest.approx(found.promise.observed)
    none = certify_texts(
        model, [Fixed(0, LAYERS)], given, Changed(0.01), max_new_tokens=12, end=END, progress=False
    )  # fmt: skip
    assert none.policy is None
    assert none.promise is None
    assert len(none.tried) == 1
    with pytest.raises(DataError, match="no policies to try"):
        certify_texts(model, [], given, Changed(0.3))


def test_a_lost_part_of_a_metric_is_bounded() -> None:
    pytest.importorskip("pycocoevalcap")
    model, _, others = trained()
    given = [others.row(i)[:3] for i in range(len(others))]
    said = [" ".join(map(str, others.row(i)[3:])) for i in range(len(others))]
    loss = MetricDrop([[each] for each in said], lambda tokens: " ".join(map(str, tokens)), share=0.05)
    whole = generate(model, None, given, max_new_tokens=12, end=END).tokens
    assert float(loss(whole, whole).mean()) == pytest.approx(
        -0.05 * caption_scores([[s] for s in said], [loss.decode(t) for t in whole]).whole["CIDEr"] / 10, rel=1e-4
    )
    assert float(loss(whole, [(3,)] * len(whole)).mean()) > 0
    found = certify_texts(model, [MaxProb((1.1,) * LAYERS)], given, loss, max_new_tokens=12, end=END, progress=False)
    assert found.tried[0].loss < 0
    with pytest.raises(ValueRangeError, match="the metric is 'BLEU-4'; expected CIDEr, ROUGE-L or METEOR"):
        MetricDrop([["a"]], str, metric="BLEU-4")


def test_scores_of_captions_are_those_of_the_field() -> None:
    pytest.importorskip("pycocoevalcap")
    given = [["A dog runs.", "The dog is running"], ["a cat sits"]]
    found = caption_scores(given, ["a dog runs", "a cat sleeps"])
    assert found.whole["BLEU-1"] == pytest.approx(5 / 6)
    assert found.rows["ROUGE-L"].tolist() == pytest.approx([1.0, 2 / 3], abs=1e-3)
    assert set(found.whole) == {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"}
    with pytest.raises(ShapeError, match="there are 1 captions for 2 images"):
        caption_scores(given, ["a dog"])
    with pytest.raises(DataError, match="one or more references"):
        caption_scores([[], ["a"]], ["a", "b"])
    with pytest.raises(ValueRangeError, match="unknown metrics F1"):
        caption_scores(given, ["a", "b"], metrics=("F1",))


@pytest.mark.skipif(shutil.which("java") is None, reason="no Java here")
def test_scores_that_need_java() -> None:
    pytest.importorskip("pycocoevalcap")
    given = [["A dog's running, fast!"], ["a cat sits"]]
    found = caption_scores(given, ["a dog 's running fast", "a cat sits"], metrics=("METEOR",), tokenizer="ptb")
    assert found.rows["METEOR"].tolist() == pytest.approx([1.0, 1.0], abs=0.02)
    with pytest.raises(DataError, match="SPICE needs models that are not here"):
        caption_scores(given, ["a dog", "a cat"], metrics=("SPICE",))
