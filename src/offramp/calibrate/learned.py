"""Policies whose parameters are learned from labelled rows: ZTW's ensemble, accuracy bins, JEI-DNN's gates."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from offramp.calibrate.ladders import ALWAYS, PriceLadder
from offramp.cost import CostModel
from offramp.errors import ValueRangeError
from offramp.policies import ZTW, AccuracyBins, Array
from offramp.policies.jeidnn import JEIDNN, gate_features
from offramp.scores import max_prob
from offramp.trace import ExitTrace

__all__ = [
    "fit_bins",
    "fit_ztw",
    "gate_ladder",
    "gates_backwards",
    "gates_in_hindsight",
    "logistic",
    "minimise",
    "multinomial",
    "some_rows",
]

#: Rows beyond these are left out of fits (not of thresholds), by seed; so are rows beyond so many logits an exit.
MAX_ROWS, MAX_LOGITS = 10_000, 1_000_000
#: ZTW's cascade has cls x cls numbers per exit; beyond so many classes it is left out.
CASCADE_CLASSES = 64


def some_rows(trace: ExitTrace, seed: int = 0) -> ExitTrace:
    """The trace, or as many rows of it as fits are made on, by seed."""
    most = min(MAX_ROWS, max(1000, MAX_LOGITS // trace.classes))
    if trace.rows <= most:
        return trace
    return trace.select(torch.randperm(trace.rows, generator=torch.Generator().manual_seed(seed))[:most].sort().values)


def fit_ztw(trace: ExitTrace, flags: tuple[bool, ...], *, cascade: bool = True, ridge: float = 1e-3) -> ZTW:
    """A ZTW that lets every row leave, its cascade and its ensemble fitted by cross-entropy on the trace.

    Args:
        cascade: whether exits see the exit before; never with more than 64 classes.
        ridge: pulls the cascade to none, the weights to 1 and the biases to 0, as sums of squares beside nats.
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
    *,
    weight: Float[Tensor, "row"] | None = None,
) -> Float[Tensor, "feature"]:
    """Weights of a logistic regression, by Newton's method in float64; `inputs` hold a column of ones for a bias.

    Args:
        ridge: half its square length times rows is added to the loss, so that separable data have an answer.
        weight: of the rows, of any scale; None for all the same.
    """
    x, y = inputs.double(), target.double()
    counts = torch.ones_like(y) if weight is None else weight.double() / weight.double().mean().clamp(min=1e-12)
    beta = torch.zeros(x.shape[1], dtype=torch.float64)
    eye = ridge * len(x) * torch.eye(x.shape[1], dtype=torch.float64)

    def loss(beta: Tensor) -> Tensor:
        z = x @ beta
        return (counts * (F.softplus(z) - y * z)).sum() + 0.5 * beta @ eye @ beta

    def slopes(beta: Tensor) -> tuple[Tensor, Tensor]:
        p = torch.sigmoid(x @ beta)
        return x.T @ (counts * (p - y)) + eye @ beta, (x * (counts * p * (1 - p))[:, None]).T @ x + eye

    return _newton(loss, slopes, beta, 50, 1e-10).float()


def multinomial(
    inputs: Float[Tensor, "row cls par"], labels: Tensor, centre: Float[Tensor, "par"], ridge: float
) -> Float[Tensor, "par"]:
    """Parameters b of logits `inputs @ b`, by Newton's method on mean cross-entropy plus ridge/2 |b - centre|^2."""
    x, y = inputs.double(), F.one_hot(labels, inputs.shape[1]).double()
    beta, eye = centre.double(), ridge * torch.eye(inputs.shape[2], dtype=torch.float64)
    rows = len(x)

    def loss(b: Tensor) -> Tensor:
        return F.cross_entropy(x @ b, labels) + 0.5 * (b - centre) @ eye @ (b - centre)

    def slopes(b: Tensor) -> tuple[Tensor, Tensor]:
        p = torch.softmax(x @ b, dim=-1)
        mean = torch.einsum("ncp,nc->np", x, p)
        hessian = (torch.einsum("ncp,nc,ncq->pq", x, p, x) - mean.T @ mean) / rows + eye
        return torch.einsum("ncp,nc->p", x, p - y) / rows + eye @ (b - centre), hessian

    return _newton(loss, slopes, beta, 30, 1e-9).float()


def _newton(
    loss: Callable[[Tensor], Tensor],
    slopes: Callable[[Tensor], tuple[Tensor, Tensor]],
    beta: Tensor,
    steps: int,
    least: float,
) -> Tensor:
    """Where a convex loss is least, by Newton's method with halved steps; `slopes` gives gradient and Hessian.

    Args:
        least: it ends when a step gains less than this part of the loss.
    """
    now = loss(beta)
    for _ in range(steps):
        gradient, hessian = slopes(beta)
        step, size = torch.linalg.solve(hessian, gradient), 1.0
        while size > 1e-4 and loss(beta - size * step) > now:
            size /= 2
        beta = beta - size * step
        before, now = now, loss(beta)
        if before - now < least * (1 + abs(float(now))):
            break
    return beta


def gate_ladder(trace: ExitTrace, costs: CostModel, flags: tuple[bool, ...], *, power: float = 0.5) -> PriceLadder:
    """JEI-DNN's gates for a range of prices, by every exit's cross-entropy."""
    rows = some_rows(trace)
    labels, visited = rows.known_labels("JEI-DNN"), [k for k, on in enumerate(flags) if on]
    losses = torch.stack([F.cross_entropy(rows.logits[k], labels, reduction="none") for k in visited])
    ones = torch.ones(rows.rows, 1)
    seen = torch.stack([torch.cat([gate_features(rows.logits[k], power), ones], dim=1) for k in visited])

    def make(price: float) -> JEIDNN:
        gates = gates_in_hindsight(seen, losses, costs, flags, price)
        return JEIDNN(Array(gates), (ALWAYS,) * rows.exits, power, None if all(flags) else flags)

    return PriceLadder(trace, flags, make, tuple(0.01 * 1.6**i for i in range(16)), rungs=60)


def gates_in_hindsight(
    seen: Float[Tensor, "visit row feature"], losses: Float[Tensor, "visit row"], costs: CostModel,
    flags: tuple[bool, ...], price: float,
) -> Float[Tensor, "exit feature"]:  # fmt: skip
    """One gate per exit: the best exit of a row is l* = argmin_l loss_l + price b_l, b_l the cost of leaving there, and
    gate k learns, by logistic regression on what is seen at exit k, whether k >= l*. The last has none."""
    visited = [k for k, on in enumerate(flags) if on]
    best = (losses + price * torch.tensor(costs.cumulative(flags))[visited][:, None]).argmin(dim=0)
    gates = torch.zeros(len(flags), seen.shape[-1])
    for place, k in enumerate(visited[:-1]):
        gates[k] = logistic(seen[place], (best <= place).float())
    return gates


def gates_backwards(
    seen: Float[Tensor, "visit row feature"], losses: Float[Tensor, "visit row"], costs: CostModel,
    flags: tuple[bool, ...], price: float,
) -> Float[Tensor, "exit feature"]:  # fmt: skip
    """One gate per exit, the last early exit's first: gate k learns whether leaving there loses no more, cost and all,
    than going on to where the gates after it leave. A row weighs what is between the two."""
    visited = [k for k, on in enumerate(flags) if on]
    lost = losses + price * torch.tensor(costs.cumulative(flags))[visited][:, None]
    gates, ahead = torch.zeros(len(flags), seen.shape[-1]), lost[-1]
    for place in range(len(visited) - 2, -1, -1):
        dearer = lost[place] - ahead
        gates[visited[place]] = logistic(seen[place], (dearer <= 0).float(), weight=dearer.abs())
        ahead = torch.where(seen[place] @ gates[visited[place]] >= 0, lost[place], ahead)
    return gates


def minimise(loss: Callable[[Tensor], Tensor], start: Tensor, steps: int = 60) -> Tensor:
    """Where a smooth loss is least, as far as L-BFGS finds it from `start`.

    Raises:
        ValueRangeError: what it found is not finite.
    """
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
