"""Policies whose parameters are learned from labelled rows: ZTW's ensemble, accuracy bins, JEI-DNN's gates."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from offramp.calibrate.ladders import ALWAYS, SharedLadder, SpendOf
from offramp.cost import CostModel
from offramp.errors import ValueRangeError
from offramp.policies import ZTW, AccuracyBins, Array, Policy
from offramp.policies.jeidnn import JEIDNN, gate_features
from offramp.scores import max_prob
from offramp.trace import ExitTrace

__all__ = ["GateLadder", "fit_bins", "fit_ztw", "logistic", "minimise", "multinomial", "some_rows"]

#: Rows beyond these are left out of fits (not of thresholds), by seed.
MAX_ROWS = 10_000
#: ZTW's cascade has cls x cls numbers per exit; beyond so many classes it is left out.
CASCADE_CLASSES = 64


def some_rows(trace: ExitTrace, most: int = MAX_ROWS, seed: int = 0) -> ExitTrace:
    """The trace, or `most` rows of it by seed."""
    if trace.rows <= most:
        return trace
    return trace.select(torch.randperm(trace.rows, generator=torch.Generator().manual_seed(seed))[:most].sort().values)


def fit_ztw(trace: ExitTrace, flags: tuple[bool, ...], *, cascade: bool = True, ridge: float = 1e-3) -> ZTW:
    """A ZTW that lets every row leave, its cascade and its ensemble fitted by cross-entropy on the trace.

    Args:
        cascade: whether exits see the exit before; never with more than 64 classes.
        ridge: pulls the cascade to none, the weights to 1 and the biases to 0, as mean squares beside nats.
    """
    rows = some_rows(trace)
    labels, exits, classes = rows.known_labels("ZTW"), rows.exits, rows.classes
    visited = [k for k, on in enumerate(flags) if on]
    steps = torch.zeros(exits, classes, classes) if cascade and classes <= CASCADE_CLASSES else None
    weights, biases = torch.zeros(exits, exits), torch.zeros(exits, classes)
    said: list[Tensor] = []
    for k in visited:
        own = rows.logits[k]
        if steps is not None and said:
            before = said[-1]

            def fit_step(p: Tensor, own: Tensor = own, before: Tensor = before) -> Tensor:
                matrix = p.view(classes, classes)
                return F.cross_entropy(own + before @ matrix.T, labels) + ridge * matrix.square().sum()

            steps[k] = minimise(fit_step, torch.zeros(classes * classes)).view(classes, classes)
            own = own + before @ steps[k].T
        said.append(torch.log_softmax(own, dim=-1))
        stacked, count = torch.stack(said, dim=1), len(said)

        def fit_mix(p: Tensor, stacked: Tensor = stacked, count: int = count) -> Tensor:
            mixed = (stacked * p[:count].exp()[:, None]).mean(dim=1) + p[count:]
            return F.cross_entropy(mixed, labels) + ridge * p.square().sum()

        found = minimise(fit_mix, torch.zeros(count + classes))
        weights[k, visited[:count]], biases[k] = found[:count], found[count:]
    on = None if all(flags) else flags
    return ZTW((ALWAYS,) * exits, Array(weights), Array(biases), None if steps is None else Array(steps), on)


def fit_bins(trace: ExitTrace, flags: tuple[bool, ...], *, bins: int = 20, isotonic: bool = True) -> AccuracyBins:
    """AccuracyBins that let every row leave: bins of equal mass at every exit, with the accuracy in each.

    Args:
        bins: at most so many; every bin has at least 25 rows where there are so many.
        isotonic: whether accuracies are made to rise with confidence.
    """
    labels, rows = trace.known_labels("AccuracyBins"), trace.rows
    count = max(1, min(bins, rows // 25))
    edges, accuracies = [], []
    for k in range(trace.exits):
        confidence, order = max_prob(trace.logits[k]).sort()
        right = (trace.logits[k].argmax(dim=-1) == labels)[order].double()
        cuts = [confidence[round(i * rows / count)].item() for i in range(1, count)]
        own = sorted(set(cuts))
        place = (confidence[:, None] >= torch.tensor(own, dtype=confidence.dtype)).sum(dim=-1)
        mass = torch.bincount(place, minlength=len(own) + 1).double()
        mean = torch.bincount(place, weights=right, minlength=len(own) + 1) / mass.clamp(min=1)
        edges.append(tuple(own))
        accuracies.append(tuple(_isotonic(mean, mass).tolist()) if isotonic else tuple(mean.tolist()))
    return AccuracyBins(tuple(edges), tuple(accuracies), (ALWAYS,) * trace.exits, None if all(flags) else flags)


def logistic(
    inputs: Float[Tensor, "row feature"],
    target: Float[Tensor, "row"],
    ridge: float = 1e-3,
    weight: Float[Tensor, "row"] | None = None,
    offset: Float[Tensor, "row"] | None = None,
) -> Float[Tensor, "feature"]:
    """Weights of a logistic regression, by Newton's method in float64; `inputs` hold a column of ones for a bias.

    Args:
        ridge: half its square length times rows is added to the loss, so that separable data have an answer.
        weight: of rows.
        offset: added to the sum, not fitted.
    """
    x, y = inputs.double(), target.double()
    w = torch.ones_like(y) if weight is None else weight.double()
    shift = torch.zeros_like(y) if offset is None else offset.double()
    beta = torch.zeros(x.shape[1], dtype=torch.float64)
    eye = ridge * w.sum() * torch.eye(x.shape[1], dtype=torch.float64)

    def loss(beta: Tensor) -> Tensor:
        z = x @ beta + shift
        return (w * (F.softplus(z) - y * z)).sum() + 0.5 * beta @ eye @ beta

    now = loss(beta)
    for _ in range(50):
        p = torch.sigmoid(x @ beta + shift)
        gradient = x.T @ (w * (p - y)) + eye @ beta
        hessian = (x * (w * p * (1 - p))[:, None]).T @ x + eye
        step, size = torch.linalg.solve(hessian, gradient), 1.0
        while size > 1e-4 and loss(beta - size * step) > now:
            size /= 2
        beta = beta - size * step
        before, now = now, loss(beta)
        if before - now < 1e-10 * (1 + abs(float(now))):
            break
    return beta.float()


def multinomial(
    inputs: Float[Tensor, "row cls par"], labels: Tensor, centre: Float[Tensor, "par"], ridge: float
) -> Float[Tensor, "par"]:
    """Parameters b of logits `inputs @ b`, by Newton's method on mean cross-entropy plus ridge/2 |b - centre|^2."""
    x, y = inputs.double(), F.one_hot(labels, inputs.shape[1]).double()
    beta, eye = centre.double(), ridge * torch.eye(inputs.shape[2], dtype=torch.float64)
    rows = len(x)

    def loss(b: Tensor) -> Tensor:
        return F.cross_entropy(x @ b, labels) + 0.5 * (b - centre) @ eye @ (b - centre)

    now = loss(beta)
    for _ in range(30):
        p = torch.softmax(x @ beta, dim=-1)
        gradient = torch.einsum("ncp,nc->p", x, p - y) / rows + eye @ (beta - centre)
        mean = torch.einsum("ncp,nc->np", x, p)
        hessian = (torch.einsum("ncp,nc,ncq->pq", x, p, x) - mean.T @ mean) / rows + eye
        step, size = torch.linalg.solve(hessian, gradient), 1.0
        while size > 1e-4 and loss(beta - size * step) > now:
            size /= 2
        beta = beta - size * step
        before, now = now, loss(beta)
        if before - now < 1e-9 * (1 + abs(float(now))):
            break
    return beta.float()


@dataclass(frozen=True)
class GateLadder:
    """JEI-DNN's gates for a range of prices; the nearest below a budget has its thresholds moved to use it up.

    A row's target is l* = argmin_l CE_l + price b_l, and gate k learns whether k >= l*.
    """

    trace: ExitTrace
    costs: CostModel
    flags: tuple[bool, ...]
    power: float = 0.5
    prices: tuple[float, ...] = tuple(0.01 * 1.6**i for i in range(16))
    rungs: int = 60
    _made: dict[int, tuple[SharedLadder, tuple[float, ...]]] = field(default_factory=dict, compare=False)

    def at(self, spend_of: SpendOf) -> Policy:
        """See `Ladder`."""
        spend = spend_of(self.flags)
        low, high = 0, len(self.prices) - 1  # a higher price spends less
        while low < high:
            middle = (low + high) // 2
            if spend.mean(self._rung(middle)[1]) <= spend.amount:
                high = middle
            else:
                low = middle + 1
        return self._rung(low)[0].at(spend_of)

    def start(self) -> Policy:
        """The policy that lets every row leave."""
        return self._rung(0)[0].start

    def _rung(self, index: int) -> tuple[SharedLadder, tuple[float, ...]]:
        """(the ladder of the gates for a price, the shares with thresholds of 0)."""
        if index not in self._made:
            rows = some_rows(self.trace)
            gates = self._gates(rows, self.prices[index])
            start = JEIDNN(Array(gates), (ALWAYS,) * rows.exits, self.power, None if all(self.flags) else self.flags)
            ladder = SharedLadder.of(start, self.trace, self.flags)
            shares = (1.0,) if ladder.scores is None else ladder.scores.shares_at(0.0)
            self._made[index] = (ladder, shares)
        return self._made[index]

    def _gates(self, rows: ExitTrace, price: float) -> Float[Tensor, "exit 5"]:
        labels, exits = rows.known_labels("JEI-DNN"), rows.exits
        visited = [k for k, on in enumerate(self.flags) if on]
        cost = torch.tensor(self.costs.cumulative(self.flags))[visited]
        losses = torch.stack([F.cross_entropy(rows.logits[k], labels, reduction="none") for k in visited])
        best = (losses + price * cost[:, None]).argmin(dim=0)
        gates = torch.zeros(exits, 5)
        for place, k in enumerate(visited[:-1]):
            seen = torch.cat([gate_features(rows.logits[k], self.power), torch.ones(rows.rows, 1)], dim=1)
            gates[k] = logistic(seen, (best <= place).float())
        return gates


def minimise(loss: Callable[[Tensor], Tensor], start: Tensor, steps: int = 60) -> Tensor:
    """Where a smooth convex loss is least, by L-BFGS; never NaN."""
    parameter = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([parameter], max_iter=steps, line_search_fn="strong_wolfe", tolerance_change=1e-9)

    def closure() -> Any:
        optimizer.zero_grad()
        value = loss(parameter)
        value.backward()
        return value

    optimizer.step(closure)
    found = parameter.detach()
    if not torch.isfinite(found).all():
        raise ValueRangeError("a fit did not converge: the logits are too large for it. Look at the trace's logits.")
    return found


def _isotonic(mean: Float[Tensor, "bin"], mass: Float[Tensor, "bin"]) -> Float[Tensor, "bin"]:
    """The nearest rising values, by pooling neighbours that fall."""
    blocks: list[list[float]] = []  # [mean, mass, how many]
    for value, weight in zip(mean.tolist(), mass.tolist(), strict=True):
        blocks.append([value, max(weight, 1e-9), 1])
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            b, a = blocks.pop(), blocks.pop()
            total = a[1] + b[1]
            blocks.append([(a[0] * a[1] + b[0] * b[1]) / total, total, a[2] + b[2]])
    return torch.tensor(np.repeat([b[0] for b in blocks], [int(b[2]) for b in blocks]), dtype=torch.float64)
