"""How rows leave a batch, and when moving those that go on into a smaller one pays."""

from collections.abc import Sequence

import torch
from torch import Tensor

from offramp.cost import CostModel
from offramp.policies.base import Step
from offramp.prediction import Prediction, check_finite
from offramp.scores import probabilities

__all__ = ["Regrouping", "Results"]

MOST = 10_000  # decisions that are remembered


class Regrouping:
    """`pays(place, flight, left)`: whether to regroup behind a visit, when `left` of `flight` rows go on.

    It pays when what lies before the next visit's end gets shorter by more than regrouping takes: stages, head and step
    at the number of rows in flight, against the number that is left. Times between measured sizes are interpolated.

    Args:
        costs: from `measure`, with the engine and in the precision that runs.
        visits: the exits that the policy visits.
    """

    def __init__(self, costs: CostModel, visits: Sequence[int]) -> None:
        self._costs, self._visits = costs, tuple(visits)
        self._known: dict[tuple[int, int, int], bool] = {}

    def __call__(self, place: int, flight: int, left: int) -> bool:
        """Whether regrouping pays behind visit number `place`."""
        key = (place, flight, left)
        if len(self._known) > MOST:
            self._known.clear()
        if key not in self._known:  # the same few numbers come again and again
            k, following = self._visits[place], self._visits[place + 1]
            saved = self._costs.span_s(k, following, flight) - self._costs.span_s(k, following, left)
            self._known[key] = saved > self._costs.regroup_s(k, flight)
        return self._known[key]


class Results:
    """Where answers gather, by the row's place in the input.

    Attributes:
        flight: how many rows the stages run on.
        left: how many of them have no answer yet.
    """

    def __init__(self, batch: int) -> None:
        self.batch = self.flight = self.left = batch
        self.rows: Tensor | None = None  # places of the rows in flight; None while that is all of them
        self.open: Tensor | None = None  # which rows in flight have no answer yet; None while that is all of them
        self.answer: Tensor
        self.score: Tensor
        self.exit: Tensor
        self.begun = False

    def leaving(self, step: Step) -> int:
        """How many rows leave at this step."""
        if self.open is not None:
            return int((step.stop & self.open).sum())
        return int(step.stop.sum() if self.flight > 1 else step.stop)

    def leave(self, k: int, step: Step, leaving: int, regroup: bool) -> Tensor | None:
        """Indices, among the rows in flight, of those that go on, or None when all stay in flight; the answers of those
        that leave are written down."""
        stop = step.stop if self.open is None else step.stop & self.open
        go = stop.nonzero()[:, 0]
        if not self.begun:
            self.begun = True
            self.answer = step.answer.new_empty((self.batch, step.answer.shape[1]), dtype=torch.float32)
            self.score = step.score.new_empty(self.batch, dtype=torch.float32)
            self.exit = torch.empty(self.batch, dtype=torch.int64, device=stop.device)
        self._write(go if self.rows is None else self.rows[go], k, step.answer[go], step.score[go])
        self.left -= leaving
        on = ~stop if self.open is None else self.open & ~stop
        if not regroup:
            self.open = on
            return None
        stay = on.nonzero()[:, 0]
        self.rows = stay if self.rows is None else self.rows[stay]
        self.open, self.flight = None, self.left
        return stay

    def finish(self, k: int, step: Step) -> None:
        """Every row without an answer leaves here."""
        if not self.begun:
            self.answer, self.score = step.answer.float(), step.score.float()
            self.exit = torch.full((self.batch,), k, dtype=torch.int64, device=step.score.device)
            return
        answer, score, places = step.answer, step.score, self.rows
        if self.open is not None:
            go = self.open.nonzero()[:, 0]
            answer, score, places = answer[go], score[go], go if places is None else places[go]
        if places is None:
            places = torch.arange(self.batch, device=score.device)
        self._write(places, k, answer, score)

    def _write(self, places: Tensor, k: int, answer: Tensor, score: Tensor) -> None:
        self.answer[places] = answer.float()  # a bf16 stage's answer joins float32 results
        self.score[places] = score.float()
        self.exit[places] = k

    def prediction(self) -> Prediction:
        """The answers, once all rows are written."""
        check_finite(self.answer)
        return Prediction(self.answer.argmax(dim=-1), probabilities(self.answer), self.exit, self.score)
