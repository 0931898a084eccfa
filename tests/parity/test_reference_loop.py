"""Every policy, row by row in plain Python with nothing but `math`, against the simulator; and the quotas likewise."""

import math
import random

import pytest
import torch

from offramp.calibrate import quota_thresholds
from offramp.cost import CostModel
from offramp.policies import BEEM, Array, EENet, Entropy, MaxProb, Patience
from offramp.simulate import simulate
from offramp.trace import ExitTrace

NEAR = 2e-5


def softmax(z: list[float]) -> list[float]:
    top = max(z)
    e = [math.exp(v - top) for v in z]
    return [v / sum(e) for v in e]


def certainty(p: list[float]) -> float:
    return 1 + sum(v * math.log(v) for v in p if v > 0) / math.log(len(p))


def sigmoid(v: float) -> float:
    return 1 / (1 + math.exp(-v))


def slow(policy, rows: list[list[list[float]]]) -> list[tuple[int, float, bool]]:
    """(exit, score there, whether a decision on the way was nearer than rounding) of every row."""
    made = []
    for row in rows:
        exits, previous, gathered, count, past, near = len(row), None, 0.0, 0, [], False
        for k, z in enumerate(row):
            last = k == exits - 1
            if policy.enabled is not None and not policy.enabled[k] and not last:
                continue
            p = softmax(z)
            label = z.index(max(z))
            if isinstance(policy, MaxProb):
                score = max(p)
            elif isinstance(policy, Entropy):
                score = certainty(p)
            elif isinstance(policy, Patience):
                count = count + 1 if label == previous else 0
                score = float(count)
            elif isinstance(policy, BEEM):
                own = policy.weights[k] * max(p)
                if label == previous:
                    gathered += own
                else:
                    gathered = own if policy.reset == "own" else 0.0
                score = gathered
            else:
                a = (p if policy.class_scores else []) + [max(p), certainty(p)] + past
                parts = [part.tolist() for part in policy.scorers[k]]
                if policy.scorer == "linear":
                    score = sum(w * v for w, v in zip(parts[0], a, strict=True))
                    past.append(min(1.0, max(0.0, score)))
                else:
                    w1, b1, w2, b2 = parts
                    hidden = [
                        sigmoid(sum(w * v for w, v in zip(line, a, strict=True)) + b)
                        for line, b in zip(w1, b1, strict=True)
                    ]
                    score = sum(w * h for w, h in zip(w2, hidden, strict=True)) + b2
                    past.append(sigmoid(score))
            previous = label
            if isinstance(policy, Patience):
                threshold = policy.patience
            else:
                threshold = policy.thresholds[k] if isinstance(policy.thresholds, tuple) else policy.thresholds
                near = near or (not last and abs(score - threshold) < NEAR)
            switched_on = policy.enabled is None or policy.enabled[k]
            if last or (switched_on and score >= threshold):
                made.append((k, score, near))
                break
    return made


def policies(exits: int, classes: int, flags, rnd: random.Random):
    def some(n=exits, scale=1.0):
        return tuple(scale * rnd.random() for _ in range(n))

    def normal(*shape):
        if not shape:
            return rnd.gauss(0, 1)
        return [normal(*shape[1:]) for _ in range(shape[0])]

    yield MaxProb(some(), flags)
    yield MaxProb(0.7, flags)
    yield Entropy(some(), flags)
    yield Patience(rnd.randrange(exits), flags)
    yield BEEM(some(), some(scale=1.5), "own", flags)
    yield BEEM(some(), some(scale=1.5), "zero", flags)
    for form, class_scores in (("linear", True), ("linear", False), ("mlp", True)):
        scorers = []
        for k in range(exits):
            width = (classes if class_scores else 0) + 2 + (k if flags is None else sum(flags[:k]))
            shapes = ((width,),) if form == "linear" else ((4, width), (4,), (4,), ())
            scorers.append(tuple(Array(normal(*shape)) for shape in shapes))
        yield EENet(tuple(scorers), some(), form, class_scores, flags)


@pytest.mark.parametrize("seed", range(12))
def test_every_policy(seed):
    rnd = random.Random(seed)
    exits, classes = rnd.choice((1, 2, 3, 6, 12)), rnd.choice((2, 3, 10))
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (60,), generator=g)
    logits = torch.randn(exits, 60, classes, generator=g) * rnd.choice((0.5, 1.0, 4.0))
    logits += 2 * torch.nn.functional.one_hot(labels, classes)
    trace = ExitTrace(logits, labels=labels)
    costs = CostModel.from_costs([k + 1.0 for k in range(exits)])
    flags = None if seed % 2 else tuple(rnd.random() < 0.6 for _ in range(exits))
    rows = trace.logits.transpose(0, 1).tolist()
    checked = 0
    for policy in policies(exits, classes, flags, rnd):
        outcome, expected = simulate(policy, trace, costs), slow(policy, rows)
        for i, (k, score, near) in enumerate(expected):
            if near:
                continue
            checked += 1
            assert outcome.exit[i] == k
            assert outcome.score[i].item() == pytest.approx(score, abs=1e-5)
            assert torch.equal(outcome.answer[i], trace.logits[k, i])
        if not any(near for *_, near in expected):
            assert outcome.cost == pytest.approx(sum(k + 1 for k, *_ in expected) / 60 / exits)
            right = sum(rows[i][k].index(max(rows[i][k])) == labels[i] for i, (k, *_) in enumerate(expected))
            assert outcome.accuracy == pytest.approx(right / 60)
    assert checked > 500


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
