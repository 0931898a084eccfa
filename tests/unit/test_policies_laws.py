"""The six laws of docs/architecture.md, over every policy."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from offramp.errors import OfframpError, ShapeError, ValueRangeError
from offramp.policies import (
    BEEM,
    EERO,
    FAMILIES,
    FPABEE,
    JEIDNN,
    PCEE,
    ZTW,
    AccuracyBins,
    Array,
    BERxiT,
    EENet,
    Entropy,
    Evidence,
    Fixed,
    Margin,
    MaxProb,
    MSDNet,
    Patience,
    Stopping,
    Voting,
    dumps,
    loads,
    visits,
)
from offramp.policies.base import check_exits
from offramp.trace import ExitTrace

SIMPLE = {kind.__name__: kind for kind in (MaxProb, Entropy, Margin, Voting, MSDNet, EERO, BERxiT)}
COUNTING = ("Patience", "FPABEE", "PCEE")
KINDS = (
    *SIMPLE, "Patience", "Patience-multilabel", "Patience-regression", "BEEM-own", "BEEM-zero", "BEEM-multilabel",
    "BEEM-regression", "FPABEE-js", "FPABEE-kl", "FPABEE-kl-reverse", "FPABEE-symmetric", "FPABEE-multilabel",
    "FPABEE-regression", "PCEE", "EENet-linear", "EENet-mlp", "EENet-few", "EENet-votes", "ZTW", "ZTW-apart", "JEIDNN",
    "AccuracyBins", "Fixed", "Stopping", "Stopping-gates",
)  # fmt: skip
NEAR = 1e-5


def evidence(policy, logits: Tensor) -> Evidence:
    """What a policy would see: a regression has one output, and a signal is something else than the logits."""
    if getattr(policy, "task", "") == "regression":
        logits = logits[:, :1]
    return Evidence(logits, torch.sigmoid(logits[:, :1].float() - 0.3) if policy.needs else None)


def counting_policy(kind: str, g: torch.Generator, exits: int, flags):
    """Policies that leave after so many exits in a row."""
    count = int(torch.randint(exits, (), generator=g))
    task = kind.partition("-")[2]
    if kind.startswith("Patience"):
        return Patience(count, flags, task or "classes", 0.8 if task == "regression" else 0.0)
    tau = 0.05 + float(torch.rand((), generator=g))
    if kind == "PCEE":
        return PCEE(tau - 0.5, count + 1, flags)
    if task in ("multilabel", "regression"):
        return FPABEE(tau, count, "js", flags, task)
    return FPABEE(tau, count, task, flags)


def random_policy(kind: str, exits: int, classes: int, seed: int, flags: tuple[bool, ...] | None):
    g = torch.Generator().manual_seed(seed)
    some = torch.rand(exits, generator=g)
    thresholds = tuple((1.2 * some).tolist())
    if kind in SIMPLE:
        return SIMPLE[kind](thresholds, enabled=flags)
    if kind.startswith(COUNTING):
        return counting_policy(kind, g, exits, flags)
    if kind.startswith("BEEM"):
        weights = tuple(torch.rand(exits, generator=g).tolist())
        if kind in ("BEEM-own", "BEEM-zero"):
            return BEEM(weights, thresholds, reset=kind[5:], enabled=flags)
        return BEEM(weights, thresholds, "own", flags, kind[5:], 0.8 if kind == "BEEM-regression" else 0.0)
    if kind.startswith("ZTW"):
        arrays = [Array(0.5 * torch.randn(s, generator=g)) for s in ((exits,) * 2, (exits, classes))]
        cascade = Array(0.2 * torch.randn(exits, classes, classes, generator=g)) if kind == "ZTW" else None
        return ZTW(thresholds, *arrays, cascade, flags)
    if kind.startswith("Stopping"):
        arrays = [Array(torch.randn(s, generator=g)) for s in ((exits,) * 2, (exits, classes), (exits, 4))]
        return Stopping(thresholds, *arrays[: 3 if kind == "Stopping-gates" else 2], enabled=flags)
    if kind == "JEIDNN":
        return JEIDNN(Array(torch.randn(exits, 5, generator=g)), thresholds, 0.5, flags)
    if kind == "AccuracyBins":
        edges, means = torch.rand(exits, 3, generator=g).sort(dim=1).values, torch.rand(exits, 4, generator=g)
        return AccuracyBins(tuple(map(tuple, edges.tolist())), tuple(map(tuple, means.tolist())), thresholds, flags)
    if kind == "Fixed":
        return Fixed(int(torch.randint(exits, (), generator=g)), exits)
    scorers = []
    for k in range(exits):
        past = k if flags is None else sum(flags[:k])
        width = 2 + past + (classes if kind != "EENet-few" else 0) + (kind == "EENet-votes")
        if kind == "EENet-mlp":
            shapes = ((3, width), (3,), (3,), ())
        else:
            shapes = ((width,),)
        scorers.append(tuple(Array(torch.randn(shape, generator=g)) for shape in shapes))
    form = "mlp" if kind == "EENet-mlp" else "linear"
    return EENet(tuple(scorers), thresholds, form, kind != "EENet-few", flags, kind == "EENet-votes")


@st.composite
def cases(draw):
    exits, classes = draw(st.integers(1, 5)), draw(st.sampled_from((2, 3, 10)))
    rows, seed = draw(st.integers(0, 9)), draw(st.integers(0, 2**20))
    flags = draw(st.none() | st.tuples(*[st.booleans()] * exits))
    g = torch.Generator().manual_seed(seed + 1)
    logits = torch.randn(exits, rows, classes, generator=g) * draw(st.sampled_from((0.1, 1.0, 30.0)))
    # agreement must happen often enough to matter
    logits[:, ::2] += 2 * nn.functional.one_hot(torch.randint(classes, (rows,), generator=g), classes)[::2]
    return exits, classes, seed, flags, logits


def run(policy, logits: Tensor):
    """Every visited exit's (stop, score, answer, state)."""
    state, steps = None, []
    for k in visits(policy, len(logits)):
        seen = evidence(policy, logits[k])
        step = policy.step(k, seen, policy.init(seen) if state is None else state)
        state = step.state
        steps.append(step)
    return steps


def assert_same_rows(ours, theirs, rows, policy):
    """The steps `ours`, made on `rows` alone, against the steps `theirs`, made on all rows."""
    # only a matrix product's last bits depend on how many rows there are
    tolerance = NEAR if isinstance(policy, EENet) and policy.scorer == "mlp" else 0.0
    near = torch.zeros(len(rows), dtype=torch.bool)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a.score, b.score[rows], rtol=0, atol=tolerance)
        assert torch.equal(a.answer, b.answer[rows])
        for x, y in zip(a.state, b.state, strict=True):
            assert torch.allclose(x, y[rows], rtol=0, atol=tolerance, equal_nan=True)
        if tolerance:
            for t in policy.thresholds:
                near |= (a.score - t).abs() < 2 * NEAR
        assert torch.equal(a.stop | near, b.stop[rows] | near)


few = settings(max_examples=15, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("kind", KINDS)
@few
@given(case=cases(), data=st.data())
def test_rowwise(kind, case, data):
    exits, classes, seed, flags, logits = case
    policy, rows = random_policy(kind, exits, classes, seed, flags), logits.shape[1]
    whole = run(policy, logits)
    chosen = data.draw(st.lists(st.integers(0, rows - 1), max_size=12)) if rows else []
    for some in (chosen, list(range(rows))[::-1], chosen[:1], []):
        index = torch.tensor(some, dtype=torch.int64)
        assert_same_rows(run(policy, logits[:, index]), whole, index, policy)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_leave_do_not_change_those_that_stay(kind):
    """Compaction between exits: the state leaves with its rows."""
    g = torch.Generator().manual_seed(5)
    logits = torch.randn(5, 40, 3, generator=g) + 2 * nn.functional.one_hot(torch.arange(40) % 3, 3)
    policy = random_policy(kind, 5, 3, 11, (True, True, False, True, True))
    whole = run(policy, logits)
    rows, state = torch.arange(40), None
    for step, k in zip(whole, visits(policy, 5), strict=True):
        seen = evidence(policy, logits[k][rows])
        ours = policy.step(k, seen, policy.init(seen) if state is None else state)
        assert torch.allclose(ours.score, step.score[rows], rtol=0, atol=1e-6)
        assert torch.equal(ours.stop, step.stop[rows])
        stay = (torch.arange(len(rows)) + k) % 3 != 0
        rows, state = rows[stay], tuple(part[stay] for part in ours.state)


@pytest.mark.parametrize("kind", KINDS)
@few
@given(case=cases(), cut=st.integers(0, 4))
def test_causal(kind, case, cut):
    exits, classes, seed, flags, logits = case
    policy = random_policy(kind, exits, classes, seed, flags)
    other = logits.clone()
    other[cut + 1 :] = other[cut + 1 :].flip(-1) * 7 + 1
    for k, a, b in zip(visits(policy, exits), run(policy, logits), run(policy, other), strict=True):
        if k <= cut:
            assert torch.equal(a.stop, b.stop)
            assert torch.equal(a.score, b.score)


@pytest.mark.parametrize("kind", KINDS)
@few
@given(case=cases())
def test_pure(kind, case):
    exits, classes, seed, flags, logits = case
    policy, before, rng = random_policy(kind, exits, classes, seed, flags), logits.clone(), torch.get_rng_state()
    state = None
    for k in visits(policy, exits):
        seen = evidence(policy, logits[k])
        state = policy.init(seen) if state is None else state
        kept = tuple(part.clone() for part in state)
        first, second = policy.step(k, seen, state), policy.step(k, seen, state)
        for a, b in zip((*first[:3], *first.state), (*second[:3], *second.state), strict=True):
            assert torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        assert all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in zip(state, kept, strict=True))
        state = first.state
    assert torch.equal(logits, before)
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("kind", KINDS)
@few
@given(case=cases())
def test_a_value(kind, case):
    exits, classes, seed, flags, logits = case
    policy = random_policy(kind, exits, classes, seed, flags)
    again, copy = loads(dumps(policy)), eval(repr(policy), {**FAMILIES, "Array": Array})
    assert again == policy == copy
    assert hash(again) == hash(policy) == hash(copy)
    assert dumps(again) == dumps(policy)
    for a, b in zip(run(policy, logits), run(again, logits), strict=True):
        assert torch.equal(a.score, b.score)
    with pytest.raises((AttributeError, TypeError)):
        policy.enabled = None


MAKERS = (MaxProb, Entropy, lambda t: BEEM((0.1, 0.2), t), lambda t: EENet(((Array([1.0]),),), t))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, (0.1, math.inf), (math.nan,)])
def test_no_infinities(bad):
    for make in MAKERS:
        with pytest.raises(ValueRangeError, match="finite"):
            make(bad)
    with pytest.raises(ValueRangeError, match="finite"):
        BEEM(bad if isinstance(bad, tuple) else (bad,), 0.5)


def test_other_fields_are_checked():
    """Values of a wrong type are in test_codec.py, where no type checker runs before ours."""
    with pytest.raises(ValueRangeError, match="patience"):
        Patience(-1)
    with pytest.raises(ValueRangeError, match="enabled"):
        Patience(1, enabled=())
    with pytest.raises(ValueRangeError, match="weights"):
        BEEM((0.1, -0.1), 0.5)
    mlp = (Array([[1.0, 2.0]]), Array([1.0]), Array([1.0]), Array(0.0))
    EENet((mlp,), 0.5, scorer="mlp")
    for bad in ((), ((),), ((Array([1.0]), Array([1.0])),), ((Array(1.0),),), (mlp,)):
        with pytest.raises(ShapeError, match="scorers"):
            EENet(bad, 0.5)
    for bad in ((*mlp[:3], Array([0.0])), (mlp[0], Array([1.0, 2.0]), *mlp[2:]), (Array([1.0]), *mlp[1:])):
        with pytest.raises(ShapeError, match="scorers"):
            EENet((bad,), 0.5, scorer="mlp")
    for bad in (None, "abc", [[1.0], [1.0, 2.0]], [10**400], object()):
        with pytest.raises(ShapeError):
            Array(bad)
    for bad in ([math.nan], [math.inf], [1e300]):
        with pytest.raises(ValueRangeError):
            Array(bad)


def test_array_is_a_copy():
    source = torch.ones(3)
    array = Array(source)
    source[0] = 7
    assert array == Array([1.0, 1.0, 1.0])
    assert array != Array([1.0, 1.0])


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_number_of_exits_is_named(kind):
    policy = random_policy(kind, 3, 2, 0, (True, True, True))
    check_exits(policy, 3)
    with pytest.raises(ShapeError, match="4 exits"):
        check_exits(policy, 4)


def test_eenet_for_other_classes_is_named():
    policy = random_policy("EENet-linear", 2, 3, 0, None)
    seen = Evidence(torch.zeros(1, 5))
    with pytest.raises(ShapeError, match="expects 5 features, got 7"):
        policy.step(0, seen, policy.init(seen))
    few_classes = random_policy("EENet-few", 2, 3, 0, None)
    with pytest.raises(OfframpError):
        few_classes.step(0, Evidence(torch.zeros(1, 1)), (torch.zeros(1, 0),))


class Cascade(nn.Module):
    """A driver unrolled for an exporter: (exit taken, stop of every visited exit)."""

    def __init__(self, policy, exits: int) -> None:
        super().__init__()
        self.policy, self.exits = policy, exits

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        state, stops, seen = None, [], None
        visited = visits(self.policy, self.exits)
        for k in visited:
            seen = evidence(self.policy, logits[:, k])
            step = self.policy.step(k, seen, self.policy.init(seen) if state is None else state)
            state = step.state
            stops.append(step.stop)
        stops[-1] = torch.ones_like(stops[-1])
        stop = torch.stack(stops, dim=1)
        first = stop.to(torch.int64).argmax(dim=1)
        return torch.tensor(visited)[first], stop


def varied(kind: str, flags: tuple[bool, ...] | None, logits: Tensor) -> Cascade:
    """A cascade of a policy of that kind under which not all rows leave at one exit."""
    if kind == "Fixed":
        return Cascade(Fixed(1, 4), 4)
    for seed in range(300):
        cascade = Cascade(random_policy(kind, 4, 3, seed, flags), 4)
        if len(cascade(logits)[0].unique()) > 1:
            return cascade
    raise AssertionError(f"no {kind} splits the rows")


class All(nn.Module):
    """Many cascades in one graph: one export is much quicker than eight."""

    def __init__(self, cascades) -> None:
        super().__init__()
        self.cascades = cascades

    def forward(self, logits: Tensor) -> list[Tensor]:
        return [part for cascade in self.cascades for part in cascade(logits)]


def test_exportable():
    g = torch.Generator().manual_seed(1)
    draw = {rows: torch.randn(rows, 4, 3, generator=g) for rows in (1, 2, 3, 7, 64)}
    for logits in draw.values():  # neighbours that agree now and then
        logits += 2 * logits[:, :1] * (torch.arange(len(logits))[:, None, None] % 2)
    off = (True, False, True, True)
    every = All([varied(kind, None if i % 2 else off, draw[64]) for i, kind in enumerate(KINDS)])
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(every, (draw[3],), dynamic_shapes=({0: batch},)).module()
    for rows in (1, 2, 7, 64):
        for ours, exported in zip(every(draw[rows]), program(draw[rows]), strict=True):
            assert torch.equal(ours, exported)


@pytest.mark.parametrize("kind", KINDS)
@few
@given(case=cases(), low=st.floats(-1, 2), more=st.floats(0, 2))
def test_monotone(kind, case, low, more):
    exits, classes, seed, flags, logits = case
    policy = random_policy(kind, exits, classes, seed, flags)

    def taken(policy):
        stop = torch.stack([step.stop for step in run(policy, logits)])
        stop[-1] = True
        return stop.int().argmax(dim=0)

    if kind == "Fixed":
        return  # it has no threshold
    if kind.startswith(COUNTING):
        first = int(low + 2)
        lower, higher = replace(policy, patience=first), replace(policy, patience=first + int(more))
    else:
        lower, higher = replace(policy, thresholds=low), replace(policy, thresholds=low + more)
    assert (taken(higher) >= taken(lower)).all()
    if kind.startswith(("FPABEE", "PCEE")):
        surer = replace(policy, tau=policy.tau + more if kind == "PCEE" else policy.tau / (1 + more))
        assert (taken(surer) >= taken(policy)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtype_of_logits_does_not_matter(kind, dtype):
    """Thresholds fitted in one dtype hold in another: scores are computed in float32."""
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(4, 50, 3, generator=g).to(dtype)
    policy = random_policy(kind, 4, 3, 3, None)
    for a, b in zip(run(policy, logits), run(policy, logits.float()), strict=True):
        assert a.score.dtype == torch.float32
        assert torch.equal(a.score, b.score)
        assert torch.equal(a.stop, b.stop)
        assert a.answer.dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_a_switched_off_exit_is_not_visited_and_never_fires(kind):
    logits = torch.tensor([80.0, 0.0, 0.0]).expand(4, 2, 3).clone()  # every confidence is exactly 1.0
    flags = (False, True, False, True)
    policy = random_policy(kind, 4, 3, 3, flags)
    if kind == "Fixed":
        policy = Fixed(1, 4)
    elif kind == "PCEE":
        policy = PCEE(-100.0, 1, flags)
    elif kind.startswith(COUNTING):
        policy = replace(policy, patience=0)
    else:
        policy = replace(policy, thresholds=-100.0)
    assert visits(policy, 4) == (1, 3)
    first = kind != "Voting"  # one vote is no vote
    stops = [s.stop.tolist() for s in run(policy, logits)]
    assert stops[0] == [first, first]
    assert stops[1] == [True, True] or kind == "Fixed"  # that the last exit stops is the driver's law
    seen = evidence(policy, logits[0])
    if not isinstance(policy, EENet):
        assert policy.step(0, seen, policy.init(seen)).stop.tolist() == [False, False]
    else:
        off = replace(policy, thresholds=-100.0, enabled=(False,) * 4)
        assert off.step(0, seen, policy.init(seen)).stop.tolist() == [False, False]


def test_the_neighbour_of_a_switched_off_exit_is_the_one_before_it():
    """Labels 0 1 0: with exit 1 off, exits 0 and 2 are neighbours and agree."""
    logits = torch.tensor([[[3.0, 0.0]], [[0.0, 3.0]], [[3.0, 0.0]]])
    on, off = (run(Patience(1, flags), logits) for flags in (None, (True, False, True)))
    assert [s.score.item() for s in on] == [0, 0, 0]
    assert [s.score.item() for s in off] == [0, 1]
    assert ExitTrace(logits).exits == 3
