"""F-PABEE: patience over exits whose whole distributions hardly move."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from offramp.errors import ValueRangeError
from offramp.policies.agreement import Task, check_task
from offramp.policies.base import Evidence, State, Step, as_flags

__all__ = ["FPABEE", "Measure", "divergence"]

Measure = Literal["js", "kl", "kl-reverse", "symmetric"]


@dataclass(frozen=True)
class FPABEE:
    """Leave at the first exit with m >= patience, where m counts how often in a row the answer hardly moved.

        m_k = m_{k-1} + 1   if D(p_{k-1}, p_k) < tau
        m_k = 0             otherwise, and at the first visited exit

    D is the Jensen-Shannon divergence ("js"), KL(p_{k-1} || p_k) ("kl"), KL(p_k || p_{k-1}) ("kl-reverse") or the mean
    of both ("symmetric"), in nats. For several labels it is the sum over them of the divergence of (p, 1 - p); for a
    regression |v_k - v_{k-1}|.

    Args:
        tau: the largest movement that counts as none, above 0; `calibrate` tunes it together with `patience`.
        patience: still exits in a row that are needed, at least 0.
        measure: the divergence.
        enabled: one flag per exit; None means that all are on. Neighbours are neighbours among those that are on.
        task: "classes", "multilabel" or "regression".

    Source: Gao et al. 2023 (F-PABEE, arXiv 2305.11916), abstract and section 3. The paper compares batches of one.
    """

    tau: float
    patience: int = 1
    measure: Measure = "js"
    enabled: tuple[bool, ...] | None = None
    task: Task = "classes"
    needs: ClassVar[tuple[str, ...]] = ()
    per_exit: ClassVar[tuple[str, ...]] = ("enabled",)

    def __post_init__(self) -> None:
        if not isinstance(self.patience, int) or isinstance(self.patience, bool) or self.patience < 0:
            raise ValueRangeError(f"patience is {self.patience!r}; expected a whole number of exits, at least 0.")
        number = isinstance(self.tau, int | float) and not isinstance(self.tau, bool)
        if not number or not 0 < self.tau < float("inf"):
            raise ValueRangeError(f"tau is {self.tau!r}; expected a finite number above 0.")
        if self.measure not in ("js", "kl", "kl-reverse", "symmetric"):
            raise ValueRangeError(f"measure is {self.measure!r}; expected 'js', 'kl', 'kl-reverse' or 'symmetric'.")
        check_task(self.task, 1.0 if self.task == "regression" else 0.0)
        object.__setattr__(self, "tau", float(self.tau))
        object.__setattr__(self, "enabled", as_flags(self.enabled))

    @property
    def thresholds(self) -> float:
        """The count that is needed, as the threshold of the score."""
        return float(self.patience)

    def init(self, seen: Evidence) -> State:
        """(logits of the exit before, NaN at first: float32 [batch cls]; still exits int64 [batch])."""
        nothing = torch.full_like(seen.logits, float("nan"), dtype=torch.float32)
        return nothing, torch.zeros_like(seen.logits[:, 0], dtype=torch.int64)

    def step(self, k: int, seen: Evidence, state: State) -> Step:
        """Stop where the count of still exits has reached `patience`."""
        previous, still = state
        logits = seen.logits.float()
        still = torch.where(divergence(previous, logits, self.measure, self.task) < self.tau, still + 1, 0)
        stop = still >= self.patience
        if self.enabled is not None and not self.enabled[k]:
            stop = torch.zeros_like(stop)
        return Step(stop, still.float(), seen.logits, (logits, still))


def divergence(
    before: Float[Tensor, "batch cls"], now: Float[Tensor, "batch cls"], measure: Measure, task: Task
) -> Float[Tensor, "batch"]:
    """How far the answer moved between two exits, at least 0; NaN where there was none before."""
    if task == "regression":
        return (now - before).abs().sum(dim=-1)
    if task == "multilabel":  # two outcomes for every label
        log_p, log_q = (torch.stack([F.logsigmoid(x), F.logsigmoid(-x)], dim=-1) for x in (before, now))
        return _divergence(log_p, log_q, measure).sum(dim=-1)
    return _divergence(torch.log_softmax(before, dim=-1), torch.log_softmax(now, dim=-1), measure)


def _divergence(log_p: Tensor, log_q: Tensor, measure: Measure) -> Tensor:
    if measure == "js":
        log_m = torch.logaddexp(log_p, log_q) - 0.6931471805599453
        return ((_kl(log_p, log_m) + _kl(log_q, log_m)) / 2).clamp_min(0)
    forward = _kl(log_p, log_q) if measure != "kl-reverse" else torch.zeros_like(log_p[..., 0])
    backward = _kl(log_q, log_p) if measure != "kl" else torch.zeros_like(log_p[..., 0])
    return ((forward + backward) / (2 if measure == "symmetric" else 1)).clamp_min(0)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)
