import dataclasses
import json
import warnings

import pytest
import torch
import torch.nn.functional as F

from offramp.errors import FormatError, ShapeError, ValueRangeError
from offramp.objectives import (
    Alternating,
    DepthWeighted,
    Distill,
    EENetLoss,
    FinalOnly,
    Objective,
    SelfDistill,
    TwoStage,
    Uniform,
    Weighted,
    objective_from_dict,
    objective_to_dict,
)

ALL = [
    DepthWeighted(),
    Uniform(),
    EENetLoss(),
    EENetLoss(alpha=0.5, temperature=2.0, distill_from=0.0),
    SelfDistill(alpha=0.25),
    Distill(temperature=4.0),
    FinalOnly(),
    TwoStage(),
    TwoStage(first=Uniform(), then=SelfDistill(alpha=0.1), first_share=0.25),
    TwoStage(then=Distill(weights="uniform"), freeze=False),
    Weighted((0.5, 0.0, 2.0)),
    SelfDistill(weights=(1.0, 1.0, 4.0)),
    Alternating(),
    Alternating(then=SelfDistill()),
]


@pytest.fixture(autouse=True)
def quiet():
    """Comparing a loss that has a gradient with a number is what these tests do."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Converting a tensor with requires_grad")
        yield


def drawn(exits=3, batch=5, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(exits, batch, classes, generator=generator).requires_grad_()
    return logits, torch.randint(0, classes, (batch,), generator=generator)


def ce(logits, labels):
    return [float(F.cross_entropy(one, labels)) for one in logits.detach()]


def kl(target, logits, t):
    """The mean over rows of KL(target || logits), softened, written out."""
    p, q = torch.softmax(target.detach() / t, -1), torch.softmax(logits.detach() / t, -1)
    return float((p * (p.log() - q.log())).sum(-1).mean())


@pytest.mark.parametrize("objective", ALL, ids=repr)
def test_is_a_value(objective):
    assert isinstance(objective, Objective)
    assert objective_from_dict(json.loads(json.dumps(objective_to_dict(objective)))) == objective
    assert eval(repr(objective)) == objective
    assert hash(objective) == hash(dataclasses.replace(objective))


@pytest.mark.parametrize("objective", ALL, ids=repr)
@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_gives_a_finite_scalar_with_a_gradient(objective, progress):
    logits, labels = drawn()
    loss = objective(logits, labels, progress=progress, teacher=torch.randn(5, 4))
    loss.backward()
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert torch.isfinite(logits.grad).all()


def test_depth_weighted_by_hand():
    logits, labels = drawn()
    one, two, three = ce(logits, labels)
    logits = logits.detach()
    assert float(DepthWeighted()(logits, labels, progress=0.0)) == pytest.approx((one + 2 * two + 3 * three) / 6)
    assert float(Uniform()(logits, labels, progress=0.0)) == pytest.approx((one + two + three) / 3)
    assert float(FinalOnly()(logits, labels, progress=0.0)) == pytest.approx(three)


def test_eenet_distils_in_its_last_quarter_alone():
    logits, labels = drawn()
    one, two, three = ce(logits, labels)
    plain = (one + 2 * two + 3 * three) / 12
    assert float(EENetLoss()(logits, labels, progress=0.74)) == pytest.approx(plain)
    more = 0.01 * 9 * sum(kl(logits[2], logits[k], 3.0) for k in range(2))
    assert float(EENetLoss()(logits, labels, progress=0.75)) == pytest.approx(plain + more, rel=1e-5)


def test_self_distill_by_hand_and_leaves_the_last_exit_to_its_labels():
    logits, labels = drawn()
    costs = ce(logits, labels)
    parts = [0.25 * costs[k] + 0.75 * 4 * kl(logits[2], logits[k], 2.0) for k in range(2)]
    loss = SelfDistill(alpha=0.25)(logits, labels, progress=0.0)
    assert float(loss) == pytest.approx((parts[0] + 2 * parts[1] + 3 * costs[2]) / 6, rel=1e-5)
    loss.backward()
    (expected,) = torch.autograd.grad(0.5 * F.cross_entropy(logits[2], labels), logits)
    torch.testing.assert_close(logits.grad[2], expected[2])


def test_distill_by_hand_and_needs_a_teacher():
    logits, labels = drawn()
    teacher = torch.randn(5, 4, requires_grad=True)
    parts = [0.3 * c + 0.7 * 4 * kl(teacher, one, 2.0) for c, one in zip(ce(logits, labels), logits, strict=True)]
    loss = Distill()(logits, labels, progress=0.0, teacher=teacher)
    assert float(loss) == pytest.approx((parts[0] + 2 * parts[1] + 3 * parts[2]) / 6, rel=1e-5)
    loss.backward()
    assert teacher.grad is None
    with pytest.raises(ValueRangeError, match="teacher"):
        Distill()(logits, labels, progress=0.0)


def test_two_stage_changes_at_its_share():
    logits, labels = drawn()
    objective = TwoStage(first=FinalOnly(), then=Uniform(), first_share=0.25)
    costs = ce(logits, labels)
    assert float(objective(logits, labels, progress=0.2)) == pytest.approx(costs[2])
    assert float(objective(logits, labels, progress=0.25)) == pytest.approx(sum(costs) / 3)


@pytest.mark.parametrize("objective", ALL, ids=repr)
def test_smoothed_labels_are_distributions(objective):
    logits, labels = drawn()
    teacher = torch.randn(5, 4)
    hard = objective(logits, labels, progress=0.9, teacher=teacher)
    soft = objective(logits, F.one_hot(labels, 4).float(), progress=0.9, teacher=teacher)
    torch.testing.assert_close(hard, soft)


@pytest.mark.parametrize("objective", [one for one in ALL if "weights=(" not in repr(one)], ids=repr)
def test_one_exit_is_enough_and_half_precision_is_summed_in_float(objective):
    logits, labels = drawn(exits=1)
    loss = objective(logits.detach().bfloat16(), labels, progress=0.9, teacher=torch.randn(5, 4))
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SelfDistill(alpha=1.5),
        lambda: SelfDistill(temperature=0.0),
        lambda: EENetLoss(alpha=float("nan")),
        lambda: EENetLoss(distill_from=-0.1),
        lambda: Distill(temperature=float("inf")),
        lambda: TwoStage(first_share=0.0),
        lambda: TwoStage(first_share=1.0),
        lambda: TwoStage(then=FinalOnly()),
        lambda: TwoStage(first=TwoStage()),
    ],
)
def test_values_out_of_range_are_named(make):
    with pytest.raises(ValueRangeError, match=r"expected|leaves nothing"):
        make()


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        {"kind": "DepthWeighted", "version": 1},
        {"kind": "Nothing", "version": 1, "fields": {}},
        {"kind": "Uniform", "version": 2, "fields": {}},
        {"kind": "Uniform", "version": 1, "fields": {"alpha": 1}},
        {"kind": "SelfDistill", "version": 1, "fields": {"alpha": 9}},
        {"kind": "TwoStage", "version": 1, "fields": {"first": 3}},
    ],
)
def test_bad_json_is_refused(value):
    with pytest.raises(FormatError):
        objective_from_dict(value)


def test_labels_of_another_batch_are_refused():
    logits, _ = drawn()
    with pytest.raises((ShapeError, TypeError)):
        DepthWeighted()(logits, torch.zeros(4, dtype=torch.int64), progress=0.0)


def test_weights_of_exits_by_hand():
    logits, labels = drawn()
    one, two, three = ce(logits, labels)
    assert float(Weighted((0.5, 0.0, 2.0))(logits, labels)) == pytest.approx((0.5 * one + 2 * three) / 2.5)
    depth = float(DepthWeighted()(logits, labels))
    assert float(Weighted((1.0, 2.0, 3.0))(logits, labels)) == pytest.approx(depth)
    teacher = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))
    each = [0.3 * c + 0.7 * 4 * kl(teacher, one, 2.0) for c, one in zip((one, two, three), logits, strict=True)]
    for weights, shares in (("depth", (1, 2, 3)), ("uniform", (1, 1, 1)), ((0.0, 1.0, 0.5), (0, 1, 0.5))):
        expected = sum(w * value for w, value in zip(shares, each, strict=True)) / sum(shares)
        said = Distill(weights=weights)(logits, labels, teacher=teacher)
        assert float(said) == pytest.approx(expected, rel=1e-5), weights


@pytest.mark.parametrize("given", [(), (-1.0, 2.0), (0.0, 0.0), (float("nan"), 1.0)])
@pytest.mark.parametrize("kind", [Weighted, Distill, SelfDistill])
def test_weights_that_cannot_be(kind, given):
    with pytest.raises(ValueRangeError, match=f"{kind.__name__}.weights"):
        kind(weights=given)


def test_words_that_are_no_weights():
    for kind in (Distill, SelfDistill):
        with pytest.raises(ValueRangeError, match="expected 'depth', 'uniform', or a number for each exit"):
            kind(weights="deep")


def test_weights_are_one_for_each_exit():
    logits, labels = drawn()
    with pytest.raises(ShapeError, match="2 weights for 3 exits"):
        Weighted((1.0, 2.0))(logits, labels)


def test_objectives_in_turns():
    turns = Alternating(FinalOnly(), Uniform())
    assert [type(turns.at(step)) for step in range(4)] == [FinalOnly, Uniform, FinalOnly, Uniform]
    logits, labels = drawn()
    both = FinalOnly()(logits, labels) + Uniform()(logits, labels)
    assert float(turns(logits, labels)) == pytest.approx(float(both) / 2)
    for wrong in (TwoStage(), Alternating()):
        with pytest.raises(ValueRangeError, match="Alternating.first"):
            Alternating(first=wrong)
    with pytest.raises(ValueRangeError, match="trains no head"):
        Alternating(then=FinalOnly())


def test_what_teaches_itself():
    assert TwoStage(then=Distill(), freeze=False).teaches_itself
    assert not TwoStage(then=Distill()).teaches_itself
    assert not TwoStage(freeze=False).teaches_itself
