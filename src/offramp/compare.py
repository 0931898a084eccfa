"""Policies side by side: calibrated on some rows, judged on others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from offramp.calibrate import Calibration, Joint, Risk, Target
from offramp.choices import CHOICES, HEADLINE, calibrate_choice, calibrator_of, choice, families_for
from offramp.cost import Budget, CostModel
from offramp.metrics import bootstrap_difference, metric_interval, metric_of, rate_interval
from offramp.policies import Policy
from offramp.pools import Pool, halves, thirds
from offramp.quality import eefp, oracle_accuracy, random_accuracy
from offramp.simulate import Outcome, simulate, walk
from offramp.sweep import Said, Sweep
from offramp.trace import ExitTrace

__all__ = [
    "BASELINE", "CHOICES", "HEADLINE", "Compared", "Pool", "area", "calibrate_choice", "calibrator_of", "choice",
    "compare", "compare_pooled", "compare_pools", "drift", "families_for", "halves", "score_quality", "thirds",
]  # fmt: skip

#: What differences are against.
BASELINE = "max-prob"


@dataclass(frozen=True)
class Compared:
    """One policy at one target: how it was calibrated, and what it did on rows it had not seen.

    Args:
        family: the name in `CHOICES`.
        target: as text.
        status, achieved: of the calibration, see `Calibration`.
        cost: mean cost on the test rows, as a fraction of the plain model.
        accuracy, low, high: on the test rows, with a 95 % interval.
        plain: the last exit's accuracy on the same rows.
        shares: of test rows that left at each exit.
        warning: that calibration and test rows differ, or None.
        policy: what was calibrated; the first one where rows were pooled.
        metric: the name of what `value`, its 95 % interval and the last exit's `value_plain` are of.
        difference, difference_low, difference_high: accuracy less that of max-prob at the same target on the same rows,
            with a paired 95 % bootstrap interval over rows; None where max-prob was not compared.
        regret: the accuracy of an oracle at the same mean cost, less this one.
        random: the expected accuracy of leaving at random with the same shares.
        lost: the share of test rows that the plain model has right and this policy wrong.
        budget: the fraction that was asked for, where the target is one.
    """

    family: str
    target: str
    status: str
    achieved: float
    cost: float
    accuracy: float
    low: float
    high: float
    plain: float
    shares: tuple[float, ...]
    warning: str | None
    policy: Policy
    metric: str = "accuracy"
    value: float = 0.0
    value_low: float = 0.0
    value_high: float = 0.0
    value_plain: float = 0.0
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    regret: float = 0.0
    random: float = 0.0
    lost: float = 0.0
    budget: float | None = None


def compare(
    fit: ExitTrace,
    test: ExitTrace,
    costs: CostModel,
    targets: Sequence[Target],
    families: Sequence[str],
    *,
    metric: str = "accuracy",
    certify: ExitTrace | None = None,
    progress: Callable[[], None] | None = None,
) -> tuple[Compared, ...]:
    """Every family at every target, fitted on `fit`, certified on `certify` and judged on `test`.

    Args:
        certify: for risks; None takes a seeded half of `fit` where a target wants it.
        progress: called after every family.

    Raises:
        DataError: the test rows have no labels.
        ValueRangeError: an unknown family.
    """
    if certify is None and any(isinstance(target, Risk | Joint) for target in targets):
        fit, certify = fit.split((0.5, 0.5))
    for one, other, what in ((fit, test, "test"), (certify, test, "test")):
        if one is not None:
            one.check_apart(other, what)
    pool = Pool(fit, test, torch.arange(test.rows), certify)
    return compare_pools([pool], test.rows, costs, targets, families, metric=metric, progress=progress)


def compare_pooled(
    pools: Sequence[Pool],
    rows: int,
    costs: CostModel,
    target: Target,
    families: Sequence[str],
    *,
    metric: str = "accuracy",
) -> tuple[Compared, ...]:
    """Every family at one target over repeated splits of the same `rows` rows; see `compare_pools`."""
    return compare_pools(pools, rows, costs, [target], families, metric=metric)


def compare_pools(
    pools: Sequence[Pool],
    rows: int,
    costs: CostModel,
    targets: Sequence[Target],
    families: Sequence[str],
    *,
    metric: str = "accuracy",
    progress: Callable[[], None] | None = None,
) -> tuple[Compared, ...]:
    """Every family at every target, in the targets' order, over splits of the same `rows` rows.

    Each row's accuracy is its mean over the splits that tested it; intervals are over rows (Wilson's for one split,
    normal for several), so repeats do not pass for new data.

    Args:
        progress: called after every family on every pool.

    Raises:
        DataError: test rows have no labels.
        ValueRangeError: an unknown family.
    """
    for name in families:
        choice(name)
    final = _mean_over(pools, rows, [(p.test.logits[-1].argmax(dim=-1) == _labels(p)).double() for p in pools])
    sweeps = [Sweep(pool.test, costs) for pool in pools]
    table: dict[tuple[str, int], tuple[Compared, Tensor]] = {}
    for name in families:
        found: list[list[tuple[Calibration, Said]]] = [[] for _ in targets]
        for pool, sweep in zip(pools, sweeps, strict=True):
            calibrator = calibrator_of(name, pool.fit, costs)
            for place, target in enumerate(targets):
                made = calibrator.to(target, pool.certify)
                found[place].append((made, sweep(made.policy)))
            if progress is not None:
                progress()
        for place, target in enumerate(targets):
            table[name, place] = _judged(name, target, pools, rows, costs, found[place], final, metric)
    return tuple(_with_difference(table, name, place) for place in range(len(targets)) for name in families)


def _judged(
    name: str, target: Target, pools: Sequence[Pool], rows: int, costs: CostModel,
    found: Sequence[tuple[Calibration, Said]], final: Tensor, metric: str,
) -> tuple[Compared, Tensor]:  # fmt: skip
    """(the row of the table, each row's accuracy, NaN where it was not tested)."""
    right = [(said.said == _labels(pool)).double() for (_, said), pool in zip(found, pools, strict=True)]
    per_row = _mean_over(pools, rows, right)
    tested = ~per_row.isnan()
    mean, plain = float(per_row[tested].mean()), float(final[tested].mean())
    low, high = rate_interval(per_row[tested])
    lost = sum(
        float(((pool.test.logits[-1].argmax(dim=-1) == _labels(pool)) & (said.said != _labels(pool))).double().mean())
        for (_, said), pool in zip(found, pools, strict=True)
    ) / len(pools)
    shares = tuple(torch.tensor([said.shares for _, said in found], dtype=torch.float64).mean(dim=0).tolist())
    random = sum(random_accuracy(p.test, said.shares) for (_, said), p in zip(found, pools, strict=True))
    oracles = [oracle_accuracy(p.test, costs, said.cost) for (_, said), p in zip(found, pools, strict=True)]
    statuses = {made.status for made, _ in found}
    alone = len(pools) == 1
    first, said = found[0]
    row = Compared(
        name, str(target), statuses.pop() if len(statuses) == 1 else "mixed",
        sum(made.achieved for made, _ in found) / len(found), sum(said.cost for _, said in found) / len(found),
        mean, low, high, plain, shares,
        drift(first, pools[0].fit, said, costs) if alone else None, first.policy,
        metric, *_metric(metric, pools, [said for _, said in found], (mean, low, high, plain)),
        regret=sum(oracles) / len(oracles) - mean,
        random=random / len(pools),
        lost=lost,
        budget=target.fraction if isinstance(target, Budget) else None,
    )  # fmt: skip
    return row, per_row


def _with_difference(table: dict[tuple[str, int], tuple[Compared, Tensor]], name: str, place: int) -> Compared:
    row, per_row = table[name, place]
    if (BASELINE, place) not in table:
        return row
    base = table[BASELINE, place][1]
    both = ~per_row.isnan() & ~base.isnan()
    mean, low, high = bootstrap_difference(per_row[both], base[both])
    return replace(row, difference=mean, difference_low=low, difference_high=high)


def _metric(
    metric: str, pools: Sequence[Pool], found: Sequence[Said], accuracy: tuple[float, float, float, float]
) -> tuple[float, float, float, float]:
    """(mean, low, high, the last exit's mean) of a metric over pools."""
    if metric == "accuracy":
        return accuracy
    values, plain = [], []
    for pool, said in zip(pools, found, strict=True):
        labels, classes = _labels(pool), pool.test.classes
        values.append(metric_of(metric, said.said, labels, classes))
        plain.append(metric_of(metric, pool.test.logits[-1].argmax(-1), labels, classes))
    one_split = len(pools) > 1 and not set(pools[0].test_rows.tolist()) & set(pools[1].test_rows.tolist())
    both = pools[: 1 + one_split]  # the two halves of one split: every row once
    said_both = torch.cat([said.said for said in found[: len(both)]])
    labels = torch.cat([_labels(pool) for pool in both])
    low, high = metric_interval(metric, said_both, labels, both[0].test.classes)
    middle = metric_of(metric, said_both, labels, both[0].test.classes)
    mean = sum(values) / len(values)
    return mean, mean + low - middle, mean + high - middle, sum(plain) / len(plain)


def area(rows: Sequence[Compared]) -> float | None:
    """The area under one family's frontier of accuracy over cost, divided by its width: a mean accuracy.

    The frontier runs from the least to the greatest mean cost on the test rows; None with fewer than two costs.
    """
    points = sorted({(row.cost, row.accuracy) for row in rows})
    if len(points) < 2 or points[-1][0] - points[0][0] < 1e-9:
        return None
    total = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(points))
    return total / (points[-1][0] - points[0][0])


def score_quality(policy: Policy, trace: ExitTrace) -> float | None:
    """The mean over early exits of `quality.eefp` of the policy's own score, answers and exits being its own.

    None where no exit has rows of both kinds.
    """
    walked = walk(policy, trace)
    right = walked.answer.argmax(dim=-1) == trace.known_labels("failure prediction")
    found = [eefp(walked.score[k], right, k) for k in range(len(walked.visited) - 1)]
    known = [value for value in found if value is not None]
    return sum(known) / len(known) if known else None


def drift(calibration: Calibration, fit: ExitTrace, outcome: Outcome | Said, costs: CostModel) -> str | None:
    """A warning when the policy spends another amount on new rows than on those it was calibrated on, or None.

    The mean costs differ by more than 3 standard errors and by more than 2 %: the rows are of another kind, and what
    was calibrated (a budget above all) does not hold for them.
    """
    cumulative = torch.tensor(costs.cumulative(calibration.policy.enabled), dtype=torch.float64)
    before, after = cumulative[simulate(calibration.policy, fit, costs).exit], cumulative[outcome.exit]
    if len(before) < 2 or len(after) < 2:
        return None
    error = (before.var() / len(before) + after.var() / len(after)).sqrt()
    change = float(after.mean() - before.mean())
    if abs(change) <= 3 * float(error) or abs(change) <= 0.02 * float(before.mean()):
        return None
    return (
        f"these rows cost {float(after.mean()):.3f} of the plain model, the calibration rows "
        f"{float(before.mean()):.3f}: they are of another kind. Calibrate on rows like those that you will serve."
    )


def _labels(pool: Pool) -> Tensor:
    return pool.test.known_labels("comparing policies")


def _mean_over(pools: Sequence[Pool], rows: int, values: Sequence[Tensor]) -> Float[Tensor, "all"]:
    """Each row's mean over the pools that tested it; NaN where none did."""
    total, times = torch.zeros(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64)
    for pool, value in zip(pools, values, strict=True):
        total.index_add_(0, pool.test_rows, value)
        times.index_add_(0, pool.test_rows, torch.ones_like(value))
    return total / times  # 0/0 is NaN
