"""The live runtime: rows that are done leave the batch, and the rest goes on smaller."""

import warnings
from typing import Any

import torch

from offramp.cost import CostModel
from offramp.engines.base import Bound, Engine
from offramp.engines.choose import engine as engine_of
from offramp.errors import ShapeError, ValueRangeError, first_line
from offramp.graph import eval_mode
from offramp.inputs import Inputs, batch_size, tensors_of
from offramp.model import ExitModel
from offramp.policies.base import Policy, State, visits
from offramp.prediction import Prediction, no_rows
from offramp.regroup import Regrouping, Results
from offramp.units import precision_of

__all__ = ["Runtime"]


class Runtime:
    """Runs a multi-exit model under a policy: `Runtime(model, policy)(inputs) -> Prediction`.

    After each exit the rows that stop leave with their state, their mask and their part of the carry. Exits that are
    switched off cost nothing. It may be called from several threads at once, with the model in eval mode.

    Args:
        model: from `attach`.
        policy: made for the same number of exits.
        engine: what runs the stages: a name ("eager", "compiled", "onnx", "onnx-file"), or what `engine(...)` returned.
        precision, threads: as for `engine`, when that is a name. The threads of eager and compiled are torch's, so they
            are set for the whole process.
        costs: from `measure` with the same engine and precision. With them, rows that are done stay in the batch
            where moving the others costs more than it saves; no answer changes (but in "int8-batch", where a row's
            answer depends on all that are in the batch).
        calibrated: the precision of the logits that the policy was calibrated on, "fp32" unless given. Thresholds of
            one precision do not hold in another: a warning says so.

    Raises:
        ShapeError: the policy is for another number of exits or needs signals that the model does not have.
        ValueRangeError: the engine, or the precision, is none that there is.
        NotStageable: the model cannot be cut at its exits, or not exported for the engine.
        MissingExtra: the engine's package is not installed.
    """

    def __init__(
        self,
        model: ExitModel,
        policy: Policy,
        engine: str | Engine = "eager",
        *,
        precision: str | None = None,
        threads: int | None = None,
        costs: CostModel | None = None,
        calibrated: str | None = None,
    ) -> None:
        if not isinstance(model, ExitModel):
            raise ShapeError(f"the model is {type(model).__name__}; expected what attach(...) returned.")
        if isinstance(engine, Engine):
            if engine.model is not model or precision not in (None, engine.precision) or threads is not None:
                raise ValueRangeError(
                    "the engine was made for another model, or another precision or number of threads; give "
                    "Runtime the model that it was made for, and nothing besides."
                )
        else:
            engine = engine_of(model, engine, precision=precision, threads=threads)
        engine.check(policy)
        self.model = model
        self.policy = policy
        self.engine = engine
        self._bound: Any = engine.bind(policy)
        self._visits = visits(policy, model.exits)
        self._pays: Regrouping | None = None
        if costs is not None and costs.measured_with(engine.name, engine.precision):
            self._pays = Regrouping(costs, self._visits)
        elif costs is not None:
            warnings.warn(
                f"the costs were {'measured' if costs.timed else 'not timed'} with {costs.engine} {costs.precision} "
                f"and this is {engine.name} {engine.precision}: rows are regrouped at every exit. Measure with this "
                "engine: measure(model, inputs, engine=...).",
                stacklevel=2,
            )
        made_on = calibrated or precision_of(model)
        if made_on != engine.precision and len(self._visits) > 1:
            warnings.warn(
                f"the policy was calibrated on logits in {made_on} and runs in {engine.precision}: its thresholds, and "
                "what was promised of it, need not hold. Record with this engine and calibrate again "
                "(record(model, data, engine=...)).",
                stacklevel=2,
            )

    @torch.inference_mode()
    def __call__(self, inputs: Inputs) -> Prediction:
        """The answers of one batch, in the order of its rows.

        Args:
            inputs: a tensor [batch ...] or a mapping of tensors, as the model takes them, on the model's device.

        Raises:
            ShapeError: a name, a shape or a length differs from what the model takes.
            ValueRangeError: an answer is NaN or infinite; the message names the rows. Or an input has numbers beyond
                what the network has a table for.
        """
        try:
            return self._in_eval_mode(inputs)
        except IndexError as error:
            raise ValueRangeError(
                f"an input has numbers that the network has no place for: {first_line(error)}. Look for token ids that "
                "are not below the vocabulary's size."
            ) from error

    def _in_eval_mode(self, inputs: Inputs) -> Prediction:
        if self.model.heads.training:  # stages are always in eval mode; heads follow the model's flag
            with eval_mode(self.model.heads):
                return self._run(inputs)
        return self._run(inputs)

    def _run(self, inputs: Inputs) -> Prediction:
        batch = batch_size(inputs)
        if batch == 0:
            return no_rows(self.model.classes, tensors_of(inputs)[0].device)
        if hasattr(self._bound, "predict"):
            return self._bound.predict(inputs)
        bound: Bound = self._bound
        results, pays = Results(batch), self._pays
        carry = bound.start(inputs)
        state: State | None = None
        for place, k in enumerate(self._visits):
            step, after = bound.visit(place, carry, state)
            leaving = results.leaving(step)
            if after is None or leaving == results.left:
                results.finish(k, step)
                break
            carry, state = after, step.state
            if leaving:
                flight = results.flight
                stay = results.leave(k, step, leaving, pays is None or pays(place, flight, results.left - leaving))
                if stay is not None:
                    carry = carry.select(stay)
                    state = tuple(part[stay] for part in state)
        return results.prediction()
