"""One family on one trace, ready for any number of targets."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from offramp.calibrate.error_rate import ErrorRate, fit_error_rate
from offramp.calibrate.families import Options, ladder_of, switched_off
from offramp.calibrate.max_drop import MaxDrop, cheapest_within
from offramp.calibrate.result import Calibration, Status
from offramp.calibrate.risk import Joint, Promise, Risk, certified, losses_of, needed_rows, promise_of
from offramp.calibrate.spend import WINDOW, Spend
from offramp.cost import Budget, CostModel
from offramp.errors import ShapeError, ValueRangeError
from offramp.policies import BEEM, Entropy, Fixed, Margin, MaxProb, Policy
from offramp.policies.base import as_flags
from offramp.simulate import simulate
from offramp.sweep import Said, Sweep
from offramp.trace import ExitTrace

__all__ = ["Calibrator", "Target"]

#: The smallest budget that is tried, where a stage costs nothing.
LEAST = 1e-6

Target = Budget | ErrorRate | MaxDrop | Risk | Joint


class Calibrator:
    """`calibrate` for several targets: what does not depend on the target is computed once.

    Args:
        family, trace, costs, enabled: as for `calibrate`.
        options: settings of families.
    """

    def __init__(
        self,
        family: type | Policy,
        trace: ExitTrace,
        costs: CostModel,
        options: Options | None = None,
        *,
        enabled: Sequence[bool] | None = None,
    ) -> None:
        for what, value, kinds in (("trace", trace, ExitTrace), ("costs", costs, CostModel)):
            if not isinstance(value, kinds):
                raise ShapeError(f"{what} is {type(value).__name__}; expected {kinds.__name__}.")
        if costs.exits != trace.exits:
            raise ShapeError(
                f"the cost model has {costs.exits} exits and the trace {trace.exits}. Measure the same model."
            )
        self.trace = trace
        self.costs = costs
        kept = enabled if enabled is not None or isinstance(family, Fixed) else getattr(family, "enabled", None)
        kept = None if isinstance(family, type) and enabled is None else kept
        self.flags = (True,) * trace.exits if kept is None else costs.visited(as_flags(kept))
        self.start, self.ladder = ladder_of(family, trace, costs, self.flags, options or Options())
        self.off = switched_off(self.start, trace)
        self._sweep = Sweep(trace, costs)
        self._made: dict[Budget, Calibration] = {}  # largest drops of two metrics try the same budgets
        self._path: list[Policy] | None = None
        self._said: tuple[ExitTrace, list[Said]] | None = None

    def to(self, target: Target, certify: ExitTrace | None = None) -> Calibration:
        """The calibration to a target; see `calibrate`."""
        return replace(self._to(target, certify), precision=self.trace.precision)

    def _to(self, target: Target, certify: ExitTrace | None) -> Calibration:
        if isinstance(target, Budget):
            return self.to_budget(target)
        if (task := getattr(self.start, "task", "classes")) != "classes":
            raise ValueRangeError(
                f"the policy is for task={task!r}, and {type(target).__name__} counts right classes. Give it a Budget."
            )
        if isinstance(target, ErrorRate):
            return self._to_error_rate(target)
        if isinstance(target, MaxDrop):
            return self._to_drop(target)
        if not isinstance(target, Risk | Joint):
            raise ValueRangeError(
                f"the target is {target!r}; expected Budget(fraction=0.5), Risk(0.01), MaxDrop(0.01) or ErrorRate()."
            )
        if certify is None:
            raise ShapeError("a risk is certified on rows that nothing was fitted on; give certify=.")
        self.trace.check_apart(certify, "certify")
        return self._to_risk(target, certify) if isinstance(target, Risk) else self._to_both(target, certify)

    def to_budget(self, target: Budget) -> Calibration:
        """The policy of the family that spends most of a budget; made once for each."""
        if target not in self._made:
            self._made[target] = self._to_budget(target)
        return self._made[target]

    def _to_budget(self, target: Budget) -> Calibration:
        exits = self.trace.exits
        if target.amount >= self.costs.spent([0.0] * (exits - 1) + [1.0], target, _only_last(exits)):
            return self._result(self.off, target)
        cheapest = self.spent(self.start, target)
        if target.amount < cheapest * (1 - 1e-9):
            return self._infeasible(target, cheapest)
        return self._result(self.ladder.at(lambda on: Spend(self.costs, target, on)), target)

    def path(self) -> list[Policy]:
        """Policies of the family from the plain model to the one that lets every row leave, by falling budgets."""
        if self._path is None:
            most = self.costs.cumulative(_only_last(self.trace.exits))[-1]
            least = self.spent(self.start, Budget(fraction=1.0))
            found, rungs = [self.off], self.ladder.rungs
            for i in range(1, rungs + 1):
                policy = self.to_budget(Budget(fraction=max(LEAST, most + (least - most) * i / rungs))).policy
                if policy != found[-1]:
                    found.append(policy)
            self._path = found
        return self._path

    def spent(self, policy: Policy, budget: Budget) -> float:
        """What a policy spends on the trace, in the budget's unit."""
        return self.costs.spent(self._sweep(policy).shares, budget, policy.enabled)

    def _to_error_rate(self, target: ErrorRate) -> Calibration:
        if type(self.start) not in (MaxProb, Entropy, Margin, BEEM):
            name = type(self.start).__name__
            raise ValueRangeError(f"{name} has no threshold to set from error rates. Give it a Budget.")
        trace = self.trace
        policy = fit_error_rate(self.start, trace, target)
        outcome = simulate(policy, trace, self.costs)
        final = trace.accuracy()[-1]
        none = not any(outcome.shares[:-1])
        message = (
            "no exit errs as rarely as the final one, so every row runs to the end."
            if none
            else f"rows leave at {outcome.cost:.3f} of the plain model's cost with accuracy {outcome.accuracy:.4f}; "
            f"the final exit alone has {final:.4f}."
        )
        return Calibration(policy, target, outcome.cost, "best_effort" if none else "met", message, trace.rows)

    def _to_drop(self, target: MaxDrop) -> Calibration:
        trace, costs = self.trace, self.costs
        least, most = max(LEAST, min(costs.cumulative(self.flags))), costs.cumulative(_only_last(trace.exits))[-1]
        found = cheapest_within(self.to_budget, trace, costs, target, least, most) if least < most else None
        if found is None:
            message = f"no cheaper policy of the family keeps {target} on these rows, so every row runs to the end."
            return Calibration(self.off, target, most, "best_effort", message, trace.rows)
        policy, cost, value, plain = found
        message = (
            f"{type(policy).__name__} spends {cost:.3f} of the plain model's cost with {target.metric} {value:.4f} "
            f"against {plain:.4f}, on these {trace.rows} rows; on others it may lose more."
        )
        return Calibration(policy, target, cost, "met", message, trace.rows)

    def _walked(self, certify: ExitTrace) -> list[Said]:
        """What every policy of the path does with the certify rows; kept for the next target."""
        if self._said is None or self._said[0] is not certify:
            sweep = Sweep(certify, self.costs)
            self._said = (certify, [sweep(policy) for policy in self.path()])
        return self._said[1]

    def _to_risk(self, target: Risk, certify: ExitTrace) -> Calibration:
        said = self._walked(certify)
        losses = losses_of(said, certify, target.loss)
        place = certified(losses, target)
        policy = self.path()[max(0, place)]
        if len(losses) == 1:
            only = "the family has no policy that is cheaper than the whole model, so every row runs to the end."
            return Calibration(
                policy, target, said[0].cost, "met", only, self.trace.rows, _certain(target, certify.rows)
            )
        if place <= 0:
            return self._nothing(target, certify, losses[1])
        promise = promise_of(losses[place], target)
        cost = said[place].cost
        saved = f"{type(policy).__name__} spends {cost:.3f} of the plain model's cost"
        return Calibration(policy, target, cost, "met", f"{saved}; {_promised(promise)}", self.trace.rows, promise)

    def _nothing(self, target: Risk, certify: ExitTrace, safest: Float[Tensor, "row"]) -> Calibration:
        """Every row runs to the end: no policy was certified; `safest` are the losses of the safest one."""
        off, rate = self.off, float(safest.double().mean())
        least, needed = needed_rows(torch.zeros(1), target), needed_rows(safest, target)
        few = least is None or certify.rows < least
        if needed is not None and needed <= certify.rows:
            needed = None  # an estimate that these rows have refuted
        promise = replace(_certain(target, certify.rows), needed=needed)
        if least is None and target.epsilon > 0:
            why = f"a risk of {target.epsilon:g} would take more certify rows than anybody has"
        elif least is None:
            why = f"a risk of {target.epsilon:g} lets no row be lost, and no number of rows can show that"
        elif few:
            why = (
                f"{certify.rows} certify rows are too few: even without any loss {least} are needed"
                f"{'' if needed in (None, least) else f', and about {needed} at the loss seen here'}"
            )
        elif rate >= target.epsilon:
            why = f"the safest policy already loses {100 * rate:.2f} % of {certify.rows} certify rows"
        else:
            more = "some more rows may be enough" if needed is None else f"about {needed} rows would be needed"
            why = (
                f"the safest policy loses {100 * rate:.2f} % of {certify.rows} certify rows, too near to the "
                f"{100 * target.epsilon:.4g} % to be sure; {more}"
            )
        message = f"{why}. Every row runs to the end, which loses nothing."
        status: Status = "infeasible" if few else "best_effort"
        cost = self.costs.cumulative(off.enabled)[-1]
        return Calibration(off, target, cost, status, message, self.trace.rows, promise)

    def _to_both(self, target: Joint, certify: ExitTrace) -> Calibration:
        risk, budget = target.risk, target.budget
        if target.prefer == "cheapest":
            found = self._to_risk(risk, certify)
            spent = self.spent(found.policy, budget)
            fits = spent <= budget.amount * (1 + 1e-9)
            status = found.status if found.status != "met" or fits else "best_effort"
            over = f"it spends {spent:.4g} of a budget of {budget}" + ("" if fits else ", which is more than there is")
            return Calibration(
                found.policy, target, spent, status, f"{found.message} On the fit rows {over}.", found.rows,
                found.promise,
            )  # fmt: skip
        made = self.to_budget(budget)
        if made.status == "infeasible":
            return Calibration(made.policy, target, made.achieved, "infeasible", made.message, made.rows)
        if made.policy == self.off:
            promise = replace(_certain(risk, certify.rows), epsilon=0.0)
            return Calibration(made.policy, target, made.achieved, "met", made.message, made.rows, promise)
        losses = losses_of([Sweep(certify, self.costs)(made.policy)], certify, risk.loss)
        promise = promise_of(losses[0], risk)
        bound = 1.0 if promise.bound is None else promise.bound
        status = "met" if bound <= risk.epsilon else "best_effort"
        promise = replace(promise, epsilon=bound)
        kept = "within" if status == "met" else "above"
        message = f"{made.message} {_promised(promise)} That is {kept} the {100 * risk.epsilon:.4g} % asked for."
        return Calibration(made.policy, target, made.achieved, status, message, made.rows, promise)

    def _infeasible(self, target: Budget, cheapest: float) -> Calibration:
        amount: dict[str, Any] = {target.unit: cheapest}
        least = str(replace(target, **amount))
        message = (
            f"a budget of {target} is below the cheapest exit: leaving at once costs {least}. "
            "Ask for at least that, attach an earlier exit, or use cheaper heads. "
            "The policy given lets every row leave at once."
        )
        return Calibration(self.start, target, self.spent(self.start, target), "infeasible", message, self.trace.rows)

    def _result(self, policy: Policy, target: Budget) -> Calibration:
        achieved = self.spent(policy, target)
        name, plain = type(policy).__name__, self.costs.plain(target)
        used = achieved / target.amount
        status: Status
        if used > 1 + 1e-9:
            status, message = "infeasible", f"{name} spends {achieved:.4g}, above the budget of {target}."
        elif used >= WINDOW - 1e-9:
            status, message = "met", f"{name} spends {achieved:.4g} of a budget of {target}."
        elif target.amount >= plain:
            status = "met"
            message = f"a budget of {target} covers the whole model ({plain:.4g}), so no row needs to leave early."
        else:
            status = "best_effort"
            message = (
                f"{name} spends {achieved:.4g} of a budget of {target}: its next step up costs more than the budget "
                "(patience comes in whole steps, and rows with tied scores leave together)."
            )
        return Calibration(policy, target, achieved, status, message, self.trace.rows)


def _certain(risk: Risk, rows: int) -> Promise:
    """The promise of the plain model, which loses nothing against itself."""
    return Promise(risk.loss, risk.used, risk.epsilon, 0.0, 0.0, rows, None)


def _promised(promise: Promise) -> str:
    """The promise as a sentence."""
    seen = f"{100 * promise.observed:.2f} % of {promise.rows} certify rows were lost"
    what = f"{promise.loss} of at most {100 * promise.epsilon:.3g} %"
    if promise.method == "plain":
        return f"{seen}. Nothing is promised for new rows."
    if promise.method == "crc":
        return f"{seen}. On new rows of the same kind a {what} is promised in the mean over such calibrations."
    sure = f"{100 * (1 - promise.delta):.4g} % confidence"
    return f"{seen}. On new rows of the same kind a {what} is promised with {sure}."


def _only_last(exits: int) -> tuple[bool, ...]:
    return (False,) * (exits - 1) + (True,)
