"""Every policy, row by row in plain Python with nothing but `math`, against the simulator; and the quotas likewise."""

import math
import random
from collections import Counter

import pytest
import torch

from offramp.calibrate import quota_thresholds
from offramp.cost import CostModel
from offramp.policies import (
    BEEM,
    EERO,
    FPABEE,
    JEIDNN,
    PCEE,
    ZTW,
    AccuracyBins,
    Array,
    BERxiT,
    EENet,
    Entropy,
    Fixed,
    Margin,
    MaxProb,
    MSDNet,
    Patience,
    Voting,
)
from offramp.simulate import simulate
from offramp.trace import ExitTrace

NEAR = 2e-5


def softmax(z: list[float]) -> list[float]:
    top = max(z)
    e = [math.exp(v - top) for v in z]
    return [v / sum(e) for v in e]


def entropy(p: list[float]) -> float:
    return -sum(v * math.log(v) for v in p if v > 0) / math.log(len(p))


def sigmoid(v: float) -> float:
    return 1 / (1 + math.exp(-v))


def dot(a, b) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def label_of(z: list[float]) -> int:
    return z.index(max(z))


def at(value, k: int):
    return value[k] if isinstance(value, tuple) else value


# A rule goes over the visited exits (k, logits, signal) of one row and yields, at each, its score (a whole number where
# it counts), the threshold, whether a comparison within was nearer than rounding, and the answer.


def confident(score_of):
    def rule(policy, seen):
        for k, z, _ in seen:
            yield score_of(softmax(z)), at(policy.thresholds, k), False, z

    return rule


def agree(policy, now, before) -> tuple[bool, bool]:
    """(whether two exits say the same, whether that is near)."""
    if before is None:
        return False, False
    if policy.task == "regression":
        gap = abs(now[0] - before[0])
        return gap < policy.tolerance, abs(gap - policy.tolerance) < NEAR
    if policy.task == "multilabel":
        return [v > 0 for v in now] == [v > 0 for v in before], False
    return label_of(now) == label_of(before), False


def patience(policy, seen):
    before, count = None, 0
    for _, z, _ in seen:
        same, near = agree(policy, z, before)
        count = count + 1 if same else 0
        yield count, policy.patience, near, z
        before = z


def beem(policy, seen):
    before, gathered = None, 0.0
    for k, z, _ in seen:
        if policy.task == "classes":
            sure = max(softmax(z))
        elif policy.task == "multilabel":
            sure = sum(max(sigmoid(v), 1 - sigmoid(v)) for v in z) / len(z)
        else:
            sure = 1.0
        same, near = agree(policy, z, before)
        own = policy.weights[k] * sure
        if same:
            gathered += own
        else:
            gathered = own if policy.reset == "own" else 0.0
        yield gathered, at(policy.thresholds, k), near, z
        before = z


def kl(p, q) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def moved(measure: str, p, q) -> float:
    if measure == "js":
        middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        return (kl(p, middle) + kl(q, middle)) / 2
    return {"kl": kl(p, q), "kl-reverse": kl(q, p), "symmetric": (kl(p, q) + kl(q, p)) / 2}[measure]


def fpabee(policy, seen):
    before, count = None, 0
    for _, z, _ in seen:
        if before is None:
            far = math.inf
        elif policy.task == "regression":
            far = abs(z[0] - before[0])
        elif policy.task == "multilabel":
            pairs = [([sigmoid(a), sigmoid(-a)], [sigmoid(b), sigmoid(-b)]) for a, b in zip(before, z, strict=True)]
            far = sum(moved(policy.measure, p, q) for p, q in pairs)
        else:
            far = moved(policy.measure, softmax(before), softmax(z))
        count = count + 1 if far < policy.tau else 0
        yield count, policy.patience, abs(far - policy.tau) < NEAR, z
        before = z


def pcee(policy, seen):
    count = 0
    for _, z, _ in seen:
        sure = 1 - entropy(softmax(z))
        count = count + 1 if sure >= policy.tau else 0
        yield count, policy.patience, abs(sure - policy.tau) < NEAR, z


def voting(policy, seen):
    votes = []
    for k, z, _ in seen:
        votes.append(label_of(z))
        share = max(Counter(votes).values()) / len(votes) ** policy.power
        yield share if len(votes) > 1 else -math.inf, at(policy.thresholds, k), False, z


def ztw(policy, seen):
    weights, biases = policy.weights.tolist(), policy.biases.tolist()
    cascade = None if policy.cascade is None else policy.cascade.tolist()
    past = []
    for k, z, _ in seen:
        if cascade is not None and past:
            z = [v + dot(line, past[-1][1]) for v, line in zip(z, cascade[k], strict=True)]
        past.append((k, [math.log(v) for v in softmax(z)]))
        mixed = [
            sum(math.exp(weights[k][j]) * said[c] for j, said in past) / len(past) + biases[k][c] for c in range(len(z))
        ]
        p = softmax(mixed)
        yield max(p), at(policy.thresholds, k), False, [math.log(v) for v in p]


def jeidnn(policy, seen):
    for k, z, _ in seen:
        p = softmax(z)
        first, second = sorted(p, reverse=True)[:2]
        flat = [v**policy.power for v in p]
        gate = policy.gates.tolist()[k]
        facts = [first, entropy(p), first - second, entropy([v / sum(flat) for v in flat])]
        yield dot(gate[:4], facts) + gate[4], at(policy.thresholds, k), False, z


def berxit(policy, seen):
    for k, z, signal in seen:
        wrong = 1 - signal
        yield 1 - wrong, at(policy.thresholds, k), False, z


def bins(policy, seen):
    for k, z, _ in seen:
        c = max(softmax(z))
        place = sum(edge <= c for edge in policy.edges[k])
        near = any(abs(edge - c) < NEAR for edge in policy.edges[k])
        yield policy.accuracies[k][place], at(policy.thresholds, k), near, z


def fixed(policy, seen):
    for k, z, _ in seen:
        yield 1, 1 if k == policy.exit else 2, False, z


def eenet(policy, seen):
    past, votes = [], []
    for k, z, _ in seen:
        p = softmax(z)
        votes.append(label_of(z))
        vote = [max(Counter(votes).values()) / len(votes)] if policy.votes else []
        a = (p if policy.class_scores else []) + [max(p), 1 - entropy(p)] + vote + past
        parts = [part.tolist() for part in policy.scorers[k]]
        if policy.scorer == "linear":
            score = dot(parts[0], a)
            past.append(min(1.0, max(0.0, score)))
        else:
            w1, b1, w2, b2 = parts
            score = dot(w2, [sigmoid(dot(line, a) + b) for line, b in zip(w1, b1, strict=True)]) + b2
            past.append(sigmoid(score))
        yield score, at(policy.thresholds, k), False, z


RULES = {
    MaxProb: confident(max),
    MSDNet: confident(max),
    EERO: confident(max),
    Entropy: confident(lambda p: 1 - entropy(p)),
    Margin: confident(lambda p: sorted(p)[-1] - sorted(p)[-2]),
    Patience: patience,
    BEEM: beem,
    FPABEE: fpabee,
    PCEE: pcee,
    Voting: voting,
    ZTW: ztw,
    JEIDNN: jeidnn,
    BERxiT: berxit,
    AccuracyBins: bins,
    Fixed: fixed,
    EENet: eenet,
}


def slow(policy, rows, signals) -> list[tuple[int, float, bool, list[float]]]:
    """(exit, score there, whether a decision on the way was nearer than rounding, answer) of every row."""
    made = []
    for row, signal in zip(rows, signals, strict=True):
        last, flags = len(row) - 1, policy.enabled
        on = [k for k in range(len(row)) if k == last or flags is None or flags[k]]
        near = False
        rule = RULES[type(policy)](policy, [(k, row[k], signal[k]) for k in on])
        for k, (score, threshold, close, answer) in zip(on, rule, strict=False):
            near = near or close or (k < last and isinstance(score, float) and abs(score - threshold) < NEAR)
            if k == last or score >= threshold:
                made.append((k, score, near, answer))
                break
    return made


def policies(exits: int, classes: int, flags, rnd: random.Random):
    def some(n=exits, scale=1.0):
        return tuple(scale * rnd.random() for _ in range(n))

    def normal(*shape):
        if not shape:
            return rnd.gauss(0, 1)
        return [normal(*shape[1:]) for _ in range(shape[0])]

    for kind in (MaxProb, MSDNet, EERO, Entropy, Margin, BERxiT):
        yield kind(some(), enabled=flags)
    yield MaxProb(0.7, flags)
    for task in ("classes", "multilabel", "regression"):
        tolerance = 0.5 if task == "regression" else 0.0
        yield Patience(rnd.randrange(exits), flags, task, tolerance)
        for reset in ("own", "zero"):
            yield BEEM(some(), some(scale=1.5), reset, flags, task, tolerance)
        yield FPABEE(0.05 + 0.5 * rnd.random(), rnd.randrange(exits), "js", flags, task)
    for measure in ("js", "kl", "kl-reverse", "symmetric"):
        for count in (1, 2):
            yield FPABEE(0.01 + rnd.random() ** 2, count, measure, flags)
            yield FPABEE(0.01 + rnd.random() ** 2, count, measure, flags, "multilabel")
    for count in (1, 2, 3):
        yield PCEE(rnd.random() / count, count, flags)
    for power in (0.0, 0.3, 0.5, 1.0):
        yield Voting(some(scale=2.0 - power), power, flags)
    yield ZTW(some(), Array(normal(exits, exits)), Array(normal(exits, classes)), None, flags)
    cascade = Array([[[0.3 * v for v in line] for line in lines] for lines in normal(exits, classes, classes)])
    yield ZTW(some(), Array(normal(exits, exits)), Array(normal(exits, classes)), cascade, flags)
    yield JEIDNN(Array(normal(exits, 5)), 0.0, 0.5, flags)
    yield JEIDNN(Array(normal(exits, 5)), some(scale=0.5), 2.5, flags)
    edges = tuple(tuple(sorted(some(4))) for _ in range(exits))
    yield AccuracyBins(edges, tuple(some(5) for _ in edges), 0.6, flags)
    yield AccuracyBins(((),) * exits, tuple(some(1) for _ in edges), some(), flags)
    yield Fixed(rnd.randrange(exits), exits)
    forms = (("linear", True, False), ("linear", False, True), ("mlp", True, False), ("mlp", True, True))
    for form, class_scores, votes in forms:
        scorers = []
        for k in range(exits):
            width = classes * class_scores + 2 + votes + (k if flags is None else sum(flags[:k]))
            shapes = ((width,),) if form == "linear" else ((4, width), (4,), (4,), ())
            scorers.append(tuple(Array(normal(*shape)) for shape in shapes))
        yield EENet(tuple(scorers), some(), form, class_scores, flags, votes)


def made_trace(exits: int, classes: int, scale: float, seed: int) -> ExitTrace:
    """Rows whose exits often agree, with two signals."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (60,), generator=g)
    logits = scale * torch.randn(60, classes, generator=g) + 0.5 * scale * torch.randn(exits, 60, classes, generator=g)
    logits += 2 * torch.nn.functional.one_hot(labels, classes)
    return ExitTrace(logits, labels, torch.rand(exits, 60, 2, generator=g), ("other", "certainty"))


def compared(policy, trace: ExitTrace) -> tuple[int, set[int]]:
    """(the number of rows compared, the exits they left at)."""
    if getattr(policy, "task", "") == "regression":
        trace = ExitTrace(trace.logits[..., :1])
    costs = CostModel.from_costs([k + 1.0 for k in range(trace.exits)])
    rows = trace.logits.transpose(0, 1).tolist()
    signals = torch.zeros(60, trace.exits) if trace.signals is None else trace.signals[..., 1].T
    outcome, expected = simulate(policy, trace, costs), slow(policy, rows, signals.tolist())
    clear = [i for i in range(60) if not expected[i][2]]
    for i in clear:
        k, score, _, answer = expected[i]
        assert outcome.exit[i] == k, policy
        if score > -math.inf:
            assert outcome.score[i].item() == pytest.approx(score, abs=1e-5)
        assert outcome.answer[i].tolist() == pytest.approx(answer, abs=1e-4 if isinstance(policy, ZTW) else 0)
    taken = [k for k, *_ in expected]
    if len(clear) == 60:
        assert outcome.shares == pytest.approx([taken.count(k) / 60 for k in range(trace.exits)])
        assert outcome.cost == pytest.approx(sum(k + 1 for k in taken) / 60 / trace.exits)
        if trace.labels is not None:
            right = sum(label_of(answer) == label for (*_, answer), label in zip(expected, trace.labels, strict=True))
            assert outcome.accuracy == pytest.approx(right / 60)
    return len(clear), {taken[i] for i in clear}


@pytest.mark.parametrize("seed", range(12))
def test_every_policy(seed):
    rnd = random.Random(seed)
    exits, classes = (1, 2, 3, 5, 6, 12)[seed // 2], rnd.choice((2, 3, 10))
    trace = made_trace(exits, classes, rnd.choice((0.5, 1.0, 4.0)), seed)
    flags = None if seed % 2 else tuple(rnd.random() < 0.6 for _ in range(exits))
    for policy in policies(exits, classes, flags, rnd):
        checked, _ = compared(policy, trace)
        assert checked >= 57, policy


def test_every_policy_leaves_at_several_exits_above():
    rnd, used = random.Random(0), {}
    for seed in range(4):
        trace = made_trace(5, 3, 1.0, seed)
        for i, policy in enumerate(policies(5, 3, (True, True, False, True, True), rnd)):
            used.setdefault((i, type(policy).__name__), set()).update(compared(policy, trace)[1])
    assert {type_.__name__ for type_ in RULES} == {name for _, name in used}
    assert [key for key, seen in used.items() if len(seen) < 2] == []
    assert all(2 not in seen for seen in used.values())  # the exit that is off


def slow_quotas(scores: list[list[float]], shares) -> tuple[list[float], list[bool], list[int]]:
    early, n = len(scores), len(scores[0])
    waiting, thresholds, on, taken = list(range(n)), [], [], [early] * n
    for k in range(early):
        quota = min(math.floor(shares[k] * n + 1e-9), len(waiting))
        on.append(quota > 0)
        if quota == 0:
            thresholds.append(0.0)
            continue
        best = sorted(waiting, key=lambda i: scores[k][i], reverse=True)[:quota]
        threshold = min(scores[k][i] for i in best)
        thresholds.append(threshold)
        for i in list(waiting):
            if scores[k][i] >= threshold:  # rows tied with the last one taken leave too
                taken[i] = k
                waiting.remove(i)
    return thresholds, on, taken


@pytest.mark.parametrize("seed", range(20))
def test_quotas(seed):
    rnd = random.Random(seed)
    early, n = rnd.randrange(1, 6), rnd.choice((1, 2, 10, 57))
    raw = [rnd.random() ** 2 * (rnd.random() < 0.8) for _ in range(early + 1)]
    shares = tuple(v / (sum(raw) or 1) for v in raw)
    grid = rnd.choice((3, 1_000_000))  # a grid of 3 ties nearly everywhere
    scores = torch.tensor([[rnd.randrange(grid) / grid for _ in range(n)] for _ in range(early)])
    thresholds, on = quota_thresholds(scores, shares)
    expected, expected_on, taken = slow_quotas(scores.tolist(), shares)
    assert thresholds == pytest.approx(expected)
    assert list(on) == expected_on
    if grid > 3:
        for k in range(early):
            assert taken.count(k) == math.floor(shares[k] * n + 1e-9)
