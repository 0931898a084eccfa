"""A largest loss as a target: the cheapest policy of a family that keeps a metric on the calibration rows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from offramp.cost import Budget, CostModel
from offramp.errors import ValueRangeError
from offramp.metrics import METRICS, metric_of
from offramp.policies import Policy
from offramp.simulate import simulate
from offramp.trace import ExitTrace

__all__ = ["COARSE", "FINE", "MaxDrop", "cheapest_within"]

#: Budgets that are tried between the cheapest exit and the plain model, and then between the last two of these.
COARSE, FINE = 40, 8


@dataclass(frozen=True)
class MaxDrop:
    """Lose at most `drop` of a metric against the plain model, on the calibration rows; it promises nothing on others.

    Args:
        drop: in parts of one: 0.01 is one point.
        metric: one of `offramp.metrics.METRICS`, e.g. "macro-f1".

    Raises:
        ValueRangeError: the drop is no number from 0 to 1, or the metric is unknown.
    """

    drop: float | int = 0.01
    metric: str = "accuracy"

    def __post_init__(self) -> None:
        good = isinstance(self.drop, Real) and not isinstance(self.drop, bool) and math.isfinite(self.drop)
        if not good or not 0 <= self.drop <= 1:
            raise ValueRangeError(f"the drop is {self.drop!r}; expected a number from 0 to 1, e.g. 0.01 for one point.")
        if self.metric not in METRICS:
            raise ValueRangeError(f"the metric is {self.metric!r}; expected one of {', '.join(METRICS)}.")
        object.__setattr__(self, "drop", float(self.drop))

    def __str__(self) -> str:
        return f"{self.metric} down by at most {100 * self.drop:.3g} points"


def cheapest_within(
    to_budget: Callable[[Budget], Any], trace: ExitTrace, costs: CostModel, target: MaxDrop, least: float, most: float
) -> tuple[Policy, float, float, float] | None:
    """(policy, cost, its metric, the plain model's) of the cheapest policy found that keeps the metric; None for none.

    A metric may fall and rise with the budget, so budgets are tried upwards from the least, `COARSE` of them, and the
    first one that keeps it is refined by `FINE` more below it.

    Args:
        to_budget: a budget to a calibration of the family.
        least, most: the costs of the cheapest exit and of the plain model.
    """
    labels = trace.known_labels("a largest drop")
    plain = metric_of(target.metric, trace.logits[-1].argmax(-1), labels, trace.classes)

    def tried(fractions: Sequence[float]) -> tuple[int, tuple[Policy, float, float, float]] | None:
        for place, fraction in enumerate(fractions):
            policy = to_budget(Budget(fraction=fraction)).policy
            outcome = simulate(policy, trace, costs)
            value = metric_of(target.metric, outcome.answer.argmax(-1), labels, trace.classes)
            if value >= plain - float(target.drop) - 1e-12 and outcome.cost <= most + 1e-12:
                return place, (policy, outcome.cost, value, plain)
        return None

    step = (most - least) / COARSE
    coarse = [least + i * step for i in range(COARSE)]
    found = tried(coarse)
    if found is None:
        return None
    place, best = found
    if place == 0:
        return best
    finer = tried([coarse[place - 1] + i * step / FINE for i in range(1, FINE)])
    return best if finer is None or finer[1][1] > best[1] else finer[1]
