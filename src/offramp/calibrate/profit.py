"""Which exits pay: those whose price in measured time is more than they save are switched off."""

from collections.abc import Callable
from dataclasses import replace

from offramp.calibrate.calibrator import Calibrator
from offramp.calibrate.result import Calibration, Status
from offramp.cost import Budget, CostModel
from offramp.simulate import simulate
from offramp.trace import ExitTrace

__all__ = ["profitable", "thinned"]

Flags = tuple[bool, ...]
Make = Callable[[Flags], Calibrator]


def profitable(make: Make, trace: ExitTrace, costs: CostModel, target: Budget) -> Calibration:
    """The calibration to a budget in milliseconds, with the exits that pay.

    An exit's price is its head, the policy's step and the regrouping, for every row that gets there. It pays when
    switching it off, so that the rows that left there leave at the next exit instead, takes more time. Those rows then
    go deeper, and thresholds are found anew for the exits that are left. Where even that is slower than the model
    without exits, the plain model is the answer.

    Args:
        make: the calibrator with these exits on.
        trace: rows that it calibrates on.
        costs: with measured times.
        target: in milliseconds.
    """
    flags: Flags = (True,) * trace.exits
    found = make(flags).to(target)
    dropped: list[int] = []
    needed: set[int] = set()  # exits that the family cannot keep the budget without
    while (worst := _worst(found, trace, costs, target, flags, needed)) is not None:
        fewer = tuple(on and k != worst for k, on in enumerate(flags))
        other = make(fewer).to(target)
        if other.status == "infeasible" and found.status != "infeasible":
            needed.add(worst)
            continue
        found, flags = other, fewer
        dropped.append(worst)
    return _told(found, dropped, make, trace, costs, target)


def thinned(make: Make, trace: ExitTrace, target: Budget, start: Calibration) -> Calibration:
    """The calibration with fewer exits, as long as the rows of the trace are answered no worse at the same budget.

    One exit after the other is switched off, the one without which most rows are answered right (with no labels: as the
    last exit answers them). The choice is made on the rows of the trace; on others the gain is smaller.

    Args:
        make: the calibrator with these exits on.
        trace: rows that it calibrates on.
        target: the budget.
        start: what thinning begins with.
    """
    best, quality = start, _quality(start, trace)
    flags: Flags = best.policy.enabled or (True,) * trace.exits
    thin: list[int] = []
    while True:
        tries = []
        for k in range(trace.exits - 1):
            if flags[k]:
                other = tuple(on and j != k for j, on in enumerate(flags))
                found = make(other).to(target)
                if found.status != "infeasible" or best.status == "infeasible":
                    tries.append((_quality(found, trace), -k, found, other))
        if not tries:
            break
        reached, place, found, other = max(tries, key=lambda item: item[:2])
        if reached < quality:
            break
        best, quality, flags = found, reached, other
        thin.append(-place)
    if not thin or best.policy == start.policy:
        return start
    off = (
        f" Without {_exits(thin)} the calibration rows are answered no worse at this budget, so they are switched off."
    )
    return replace(best, message=best.message + off)


def _quality(found: Calibration, trace: ExitTrace) -> float:
    """The share of rows that are answered right, or as the last exit answers where right answers are not known."""
    outcome = simulate(found.policy, trace, CostModel.from_costs(tuple(range(1, trace.exits + 1))))
    right = trace.labels if trace.labels is not None else trace.logits[-1].argmax(-1)
    return float((outcome.answer.argmax(-1) == right).double().mean())


def _worst(
    found: Calibration, trace: ExitTrace, costs: CostModel, target: Budget, flags: Flags, needed: set[int]
) -> int | None:
    """The exit whose absence saves most time, of those that are not needed; None when all pay."""
    shares = list(simulate(found.policy, trace, costs).shares)
    on = costs.visited(found.policy.enabled)
    now, best, worst = costs.seconds(shares, target.batch_size, on), 0.0, None
    for k in range(trace.exits - 1):
        if not (flags[k] and on[k]) or k in needed:
            continue
        following = next(j for j in range(k + 1, trace.exits) if on[j])
        moved = list(shares)
        moved[k], moved[following] = 0.0, shares[following] + shares[k]
        without = tuple(each and j != k for j, each in enumerate(on))
        saved = now - costs.seconds(moved, target.batch_size, without)
        if saved > max(best, 1e-9 * now):
            best, worst = saved, k
    return worst


def _told(
    found: Calibration, dropped: list[int], make: Make, trace: ExitTrace, costs: CostModel, target: Budget
) -> Calibration:
    """The calibration with a sentence on exits that were switched off, or the plain model where that is faster."""
    plain = costs.plain(target)
    if found.achieved >= plain and any(costs.visited(found.policy.enabled)[:-1]):
        off = make((True,) * trace.exits).off
        message = (
            f"the plain model is the better choice at batch {target.batch_size}: it takes {plain:.4g} ms, and the "
            f"cheapest that keeps to the family takes {found.achieved:.4g} ms. Every row runs to the end."
        )
        status: Status = "infeasible" if plain > target.amount * (1 + 1e-9) else "met"
        return replace(found, policy=off, achieved=plain, status=status, message=message)
    if not dropped:
        return found
    many = "each takes" if len(dropped) > 1 else "it takes"
    why = f" {_exits(dropped).capitalize()} switched off: {many} more time at batch {target.batch_size} than it saves."
    return replace(found, message=found.message + why)


def _exits(numbers: list[int]) -> str:
    told = ", ".join(map(str, sorted(numbers)))
    return f"exit {told}" if len(numbers) == 1 else f"exits {told}"
