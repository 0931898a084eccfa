"""The live runtime: rows that are done leave the batch, and the rest goes on smaller."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from offramp.errors import ShapeError, ValueRangeError
from offramp.graph import eval_mode
from offramp.inputs import Inputs, batch_size
from offramp.model import ExitModel
from offramp.policies.base import Evidence, Policy, State, Step, check_exits, visits
from offramp.scores import probabilities

__all__ = ["Prediction", "Runtime", "check_signals"]


@dataclass(frozen=True, eq=False)
class Prediction:
    """Answers in the order of the input rows.

    Args:
        label: the most probable class, int64 [batch].
        probabilities: float32 [batch cls], of the exit each row left at.
        exit: the exit each row left at, 0-based int64 [batch].
        score: the policy's score there, float32 [batch].
    """

    label: Int64[Tensor, "batch"]
    probabilities: Float[Tensor, "batch cls"]
    exit: Int64[Tensor, "batch"]
    score: Float[Tensor, "batch"]


class Runtime:
    """Runs a multi-exit model under a policy: `Runtime(model, policy)(inputs) -> Prediction`.

    Stages run in eager mode, under inference mode and in eval mode. After each exit the rows that stop leave with their
    state, their mask and their part of the carry. Exits that are switched off cost nothing. It may be called from
    several threads at once.

    Args:
        model: from `attach`.
        policy: made for the same number of exits.

    Raises:
        ShapeError: the policy is for another number of exits or needs signals that the model does not have.
        NotStageable: the model cannot be cut at its exits.
    """

    def __init__(self, model: ExitModel, policy: Policy) -> None:
        if not isinstance(model, ExitModel):
            raise ShapeError(f"the model is {type(model).__name__}; expected what attach(...) returned.")
        if isinstance(policy, type) or not isinstance(policy, Policy):
            raise ShapeError(f"the policy is {policy!r}; expected a value such as MaxProb(0.9).")
        check_exits(policy, model.exits)
        check_signals(policy, model.signals)
        self.model = model
        self.policy = policy
        self._visits = frozenset(visits(policy, model.exits))
        self._columns = [model.signals.index(name) for name in policy.needs]
        model.stages()

    @torch.inference_mode()
    def __call__(self, inputs: Inputs) -> Prediction:
        """The answers of one batch, in the order of its rows.

        Args:
            inputs: a tensor [batch ...] or a mapping of tensors, as the model takes them, on the model's device.

        Raises:
            ValueRangeError: an answer is NaN or infinite; the message names the rows.
        """
        if self.model.heads.training:  # stages are always in eval mode; heads follow the model's flag
            with eval_mode(self.model.heads):
                return self._run(inputs)
        return self._run(inputs)

    def _run(self, inputs: Inputs) -> Prediction:
        batch = batch_size(inputs)
        if batch == 0:
            empty = torch.zeros(0, self.model.classes)
            return Prediction(empty.argmax(-1), empty, torch.zeros(0, dtype=torch.int64), torch.zeros(0))
        results = _Results(batch)
        stages, policy = self.model.stages(), self.policy
        carry = stages.start(inputs)
        state: State | None = None
        for k in range(self.model.exits):
            tap, after = stages.run(k, carry)
            if after is None:  # the last exit: what ends there are the model's own logits
                seen = Evidence(tap, tap.new_zeros(len(tap), len(policy.needs)) if policy.needs else None)
            elif k in self._visits:
                if policy.needs:
                    seen = self._evidence(k, tap, after.mask)
                else:
                    seen = Evidence(self.model.head_logits(k, tap, after.mask))
            else:
                carry = after
                continue
            step = policy.step(k, seen, policy.init(seen) if state is None else state)
            rows = len(step.stop)
            leaving = int(step.stop.sum() if rows > 1 else step.stop)
            if after is None or leaving == rows:
                results.finish(k, step)
                break
            carry, state = after, step.state
            if leaving:
                stay = results.leave(k, step)
                carry = carry.select(stay)
                state = tuple(part[stay] for part in state)
        return results.prediction()

    def _evidence(self, k: int, tap: Tensor, mask: Tensor | None) -> Evidence:
        """Exit k's logits, and the signals that the policy needs in its order."""
        logits, signals = self.model.evidence(k, tap, mask)
        if signals is not None and self.policy.needs != self.model.signals:
            signals = signals[:, self._columns]
        return Evidence(logits, signals)


def check_signals(policy: Policy, signals: tuple[str, ...]) -> None:
    """Nothing, when every signal that the policy needs is among those of a model.

    Raises:
        ShapeError: one is missing.
    """
    if missing := [name for name in policy.needs if name not in signals]:
        has = f"only the signals {', '.join(signals)}" if signals else "logits only"
        raise ShapeError(
            f"{type(policy).__name__} needs the signals {', '.join(missing)}; the model has {has}. "
            "Give it what is missing, such as learn_certainty(model, data), or another policy."
        )


class _Results:
    """Where answers gather, by the row's place in the input."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.rows: Tensor | None = None  # places of the rows still running; None while that is all of them
        self.answer: Tensor
        self.score: Tensor
        self.exit: Tensor

    def leave(self, k: int, step: Step) -> Tensor:
        """Indices, among the rows in flight, of those that stay; the others' answers are written down."""
        go, stay = step.stop.nonzero()[:, 0], (~step.stop).nonzero()[:, 0]
        if self.rows is None:
            self.answer = step.answer.new_empty((self.batch, step.answer.shape[1]), dtype=torch.float32)
            self.score = step.score.new_empty(self.batch, dtype=torch.float32)
            self.exit = torch.empty(self.batch, dtype=torch.int64, device=step.stop.device)
            self.rows = torch.arange(self.batch, device=step.stop.device)
        self._write(self.rows[go], k, step.answer[go], step.score[go])
        self.rows = self.rows[stay]
        return stay

    def finish(self, k: int, step: Step) -> None:
        """Every row in flight leaves here."""
        if self.rows is None:
            self.answer, self.score = step.answer.float(), step.score.float()
            self.exit = torch.full((self.batch,), k, dtype=torch.int64, device=step.stop.device)
        else:
            self._write(self.rows, k, step.answer, step.score)

    def _write(self, places: Tensor, k: int, answer: Tensor, score: Tensor) -> None:
        self.answer[places] = answer.float()  # a bf16 stage's answer joins float32 results
        self.score[places] = score.float()
        self.exit[places] = k

    def prediction(self) -> Prediction:
        """The answers, once all rows are written."""
        if not math.isfinite(float(self.answer.sum())):  # one operator where all is well
            rows = (~torch.isfinite(self.answer).all(dim=1)).nonzero()[:, 0].tolist()
            if rows:
                raise ValueRangeError(
                    f"the model's answers for rows {rows[:8]}{' ...' if len(rows) > 8 else ''} are NaN or infinite. "
                    "Look for NaN in the inputs, or weights that overflow in this precision."
                )
        return Prediction(self.answer.argmax(dim=-1), probabilities(self.answer), self.exit, self.score)
