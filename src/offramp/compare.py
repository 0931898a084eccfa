"""Policies side by side: calibrated on some rows, judged on others."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from offramp.calibrate import Calibration, ErrorRate, MaxDrop, calibrate
from offramp.cost import Budget, CostModel
from offramp.errors import ValueRangeError
from offramp.metrics import accuracy_interval, metric_interval, metric_of
from offramp.policies import (
    BEEM,
    EERO,
    FPABEE,
    JEIDNN,
    PCEE,
    ZTW,
    AccuracyBins,
    BERxiT,
    EENet,
    Entropy,
    Fixed,
    Margin,
    MaxProb,
    MSDNet,
    Patience,
    Policy,
    Voting,
)
from offramp.simulate import Outcome, simulate
from offramp.splits import stratified_split
from offramp.trace import ExitTrace

__all__ = [
    "CHOICES",
    "HEADLINE",
    "Compared",
    "Pool",
    "calibrate_choice",
    "choice",
    "compare",
    "compare_pooled",
    "drift",
    "families_for",
    "halves",
]

#: What `--family` and tables call a family with its options.
CHOICES: dict[str, tuple[type, dict[str, Any]]] = {
    "max-prob": (MaxProb, {}),
    "entropy": (Entropy, {}),
    "margin": (Margin, {}),
    "patience": (Patience, {}),
    "f-pabee": (FPABEE, {}),
    "pcee": (PCEE, {}),
    "voting": (Voting, {}),
    "msdnet": (MSDNet, {}),
    "beem-c": (BEEM, {"weights": "cost"}),
    "beem-a": (BEEM, {"weights": "accuracy"}),
    "eenet": (EENet, {}),
    "ztw": (ZTW, {}),
    "jei-dnn": (JEIDNN, {}),
    "berxit": (BERxiT, {}),
    "accuracy-bins": (AccuracyBins, {}),
    "eero": (EERO, {}),
    "fixed": (Fixed, {}),
}


#: What quickstart and reports show unless asked for more.
HEADLINE = ("max-prob", "entropy", "patience", "beem-c", "beem-a", "eenet")


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


@dataclass(frozen=True, eq=False)
class Pool:
    """Disjoint rows of one trace: what a policy is calibrated on, and what it is tested on."""

    fit: ExitTrace
    test: ExitTrace
    test_rows: Tensor


def choice(name: str) -> tuple[type, dict[str, Any]]:
    """The family and the options that a name stands for.

    Raises:
        ValueRangeError: the name is unknown.
    """
    if name not in CHOICES:
        raise ValueRangeError(f"unknown policy {name!r}; expected one of {', '.join(CHOICES)}.")
    return CHOICES[name]


def families_for(trace: ExitTrace) -> tuple[str, ...]:
    """The names in `CHOICES` that a trace has the signals for."""
    return tuple(name for name, (kind, _) in CHOICES.items() if set(kind.needs) <= set(trace.signal_names))


def calibrate_choice(
    name: str, trace: ExitTrace, costs: CostModel, target: Budget | ErrorRate | MaxDrop
) -> Calibration:
    """`calibrate` for a family named as in `CHOICES`."""
    family, options = choice(name)
    return calibrate(family, trace, costs, target, **options)


def compare(
    fit: ExitTrace,
    test: ExitTrace,
    costs: CostModel,
    targets: Sequence[Budget | ErrorRate | MaxDrop],
    families: Sequence[str],
    *,
    metric: str = "accuracy",
) -> tuple[Compared, ...]:
    """Every family at every target, calibrated on `fit` and judged on `test`. Intervals are Wilson's.

    Raises:
        DataError: the test rows have no labels.
        ValueRangeError: an unknown family.
    """
    labels = test.known_labels("comparing policies")
    plain = float((test.logits[-1].argmax(-1) == labels).double().mean())
    rows = []
    for target in targets:
        for name in families:
            calibration = calibrate_choice(name, fit, costs, target)
            outcome = simulate(calibration.policy, test, costs)
            low, high = accuracy_interval(round((outcome.accuracy or 0.0) * test.rows), test.rows)
            rows.append(
                Compared(
                    name, str(target), calibration.status, calibration.achieved, outcome.cost, outcome.accuracy or 0.0,
                    low, high, plain, outcome.shares, drift(calibration, fit, outcome, costs), calibration.policy,
                    metric, metric_of(metric, outcome.answer.argmax(-1), labels, test.classes),
                    *metric_interval(metric, outcome.answer.argmax(-1), labels, test.classes),
                    metric_of(metric, test.logits[-1].argmax(-1), labels, test.classes),
                )
            )  # fmt: skip
    return tuple(rows)


def halves(trace: ExitTrace, repeats: int = 20, *, seed: int = 0) -> tuple[Pool, ...]:
    """Two pools per repeat: a seeded half to calibrate on and the other to test on, then swapped."""
    pools = []
    for repeat in range(repeats):
        parts = _halves_of(trace, seed + repeat)
        for one, other in (parts, parts[::-1]):
            pools.append(Pool(trace.select(one), trace.select(other), other))
    return tuple(pools)


def _halves_of(trace: ExitTrace, seed: int) -> tuple[Tensor, Tensor]:
    """Row indices of two halves with the classes in proportion."""
    strata = trace.labels if trace.labels is not None else torch.zeros(trace.rows, dtype=torch.int64)
    one, other = stratified_split(strata, (0.5, 0.5), seed=seed)
    return one, other


def compare_pooled(
    pools: Sequence[Pool],
    rows: int,
    costs: CostModel,
    target: Budget | ErrorRate | MaxDrop,
    families: Sequence[str],
    *,
    metric: str = "accuracy",
) -> tuple[Compared, ...]:
    """Every family at one target over repeated splits of the same `rows` rows.

    Each row's accuracy is its mean over the splits that tested it; the interval is over rows (normal, 95 %), so repeats
    do not pass for new data.
    """
    table = []
    for name in families:
        found = [calibrate_choice(name, pool.fit, costs, target) for pool in pools]
        outcomes = [simulate(c.policy, pool.test, costs) for c, pool in zip(found, pools, strict=True)]
        right = torch.stack([_spread(o.right, pool.test_rows, rows) for o, pool in zip(outcomes, pools, strict=True)])
        final = torch.stack([_spread(_last_right(pool.test), pool.test_rows, rows) for pool in pools])
        per_row, plain = right.nanmean(dim=0), float(final.nanmean())
        mean = float(per_row.nanmean())
        half = 1.96 * float(per_row[~per_row.isnan()].std()) / rows**0.5
        shares = torch.tensor([o.shares for o in outcomes], dtype=torch.float64).mean(dim=0)
        statuses = {c.status for c in found}
        table.append(
            Compared(
                name, str(target), statuses.pop() if len(statuses) == 1 else "mixed",
                sum(c.achieved for c in found) / len(found), sum(o.cost for o in outcomes) / len(outcomes),
                mean, mean - half, mean + half, plain, tuple(shares.tolist()), None, found[0].policy,
                metric, *_pooled_metric(metric, pools, outcomes, (mean, mean - half, mean + half, plain)),
            )
        )  # fmt: skip
    return tuple(table)


def _pooled_metric(
    metric: str, pools: Sequence[Pool], outcomes: Sequence[Outcome], accuracy: tuple[float, float, float, float]
) -> tuple[float, float, float, float]:
    """(mean, low, high, the last exit's mean) of a metric over pools."""
    if metric == "accuracy":
        return accuracy
    values, plain = [], []
    for pool, outcome in zip(pools, outcomes, strict=True):
        labels, classes = pool.test.known_labels("comparing policies"), pool.test.classes
        values.append(metric_of(metric, outcome.answer.argmax(-1), labels, classes))
        plain.append(metric_of(metric, pool.test.logits[-1].argmax(-1), labels, classes))
    both = pools[:2]  # the two halves of one split: every row once
    said = torch.cat([outcome.answer.argmax(-1) for outcome in outcomes[: len(both)]])
    labels = torch.cat([pool.test.known_labels("comparing policies") for pool in both])
    low, high = metric_interval(metric, said, labels, both[0].test.classes)
    middle = metric_of(metric, said, labels, both[0].test.classes)
    mean = sum(values) / len(values)
    return mean, mean + low - middle, mean + high - middle, sum(plain) / len(plain)


def drift(calibration: Calibration, fit: ExitTrace, outcome: Outcome, costs: CostModel) -> str | None:
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


def _last_right(trace: ExitTrace) -> Bool[Tensor, "row"]:
    return trace.logits[-1].argmax(dim=-1) == trace.known_labels("comparing policies")


def _spread(right: Bool[Tensor, "row"] | None, places: Tensor, rows: int) -> Float[Tensor, "all"]:
    full = torch.full((rows,), float("nan"), dtype=torch.float64)
    full[places] = right.double() if right is not None else float("nan")
    return full
