"""How often promises fail: certify rows drawn a thousand times with replacement from the pool of a real trace, failure
counted on the whole pool. Writes results/promises-NAME.json.

    python -m experiments.ours.promises runs/ag_news/test.safetensors --costs runs/ag_news/costs.json --name ag_news

The policies are max-prob with one threshold from a grid that no row has chosen, so that nothing is fitted and the whole
pool can be drawn from.
"""

import argparse
from pathlib import Path

import torch

from offramp import CostModel, ExitTrace, MaxProb
from offramp.artefacts import write_json
from offramp.calibrate.bounds import betting_p, count_p
from offramp.calibrate.risk import Risk, losses_of
from offramp.meter import Meter
from offramp.sweep import Sweep

#: (loss, method): what is compared.
WAYS = (
    ("drop", "plain"), ("drop", "ltt"), ("drop", "betting"), ("drop", "crc"),
    ("disagreement", "plain"), ("disagreement", "ltt"),
    ("signed drop", "plain"), ("signed drop", "betting"),
)  # fmt: skip


def thresholds(count: int) -> list[float]:
    """From one that no row reaches to one that all do, dense where probabilities are near 1."""
    odds = torch.linspace(12.0, -3.0, count, dtype=torch.float64)
    return [1.5, *torch.sigmoid(odds).tolist(), 0.0]


def chosen(losses: torch.Tensor, risk: Risk, rows: torch.Tensor) -> torch.Tensor:
    """The place of the last certified policy for every draw; losses [policy row], rows [draw row]."""
    count, places = rows.shape[1], torch.zeros(len(rows), dtype=torch.int64)
    going = torch.ones(len(rows), dtype=torch.bool)
    risen = losses[0][rows] if risk.used == "crc" else None
    for place in range(1, len(losses)):
        drawn = losses[place][rows]
        if risk.used == "plain":
            good = drawn.mean(dim=1) <= risk.epsilon + 1e-9
        elif risk.used == "crc":
            risen = torch.maximum(risen, drawn)
            good = risen.mean(dim=1) <= ((count + 1) * risk.epsilon - 1) / count + 1e-9
        elif risk.used == "ltt":
            good = count_p(drawn.sum(dim=1).long(), count, risk.epsilon) <= risk.delta
        else:
            good = betting_p(drawn, risk.epsilon, risk.delta, least=risk.least) <= risk.delta
        going &= good
        places[going] = place
        if not bool(going.any()):
            break
    return places


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--costs", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--epsilon", type=float, default=0.01)
    parser.add_argument("--delta", type=float, default=0.1)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--grid", type=int, default=150)
    options = parser.parse_args()
    trace, costs = ExitTrace.load(options.trace), CostModel.load(options.costs)
    sweep = Sweep(trace, costs)
    said = [sweep(MaxProb(t)) for t in thresholds(options.grid)]
    cost = torch.tensor([one.cost for one in said], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(trace.rows, (options.draws, options.rows), generator=generator)
    found, plain_saving = [], {}
    with Meter("drawing", len(WAYS), show=True) as meter:
        for loss, method in WAYS:
            risk = Risk(options.epsilon, options.delta, loss, method)
            losses = losses_of(said, trace, loss)
            true = losses.double().mean(dim=1)
            parts = [chosen(losses, risk, part) for part in rows.split(100)]
            place = torch.cat(parts)
            saving = float((cost[0] - cost[place]).mean())
            plain_saving.setdefault(loss, saving)
            failed = float((true[place] > options.epsilon + 1e-12).double().mean())
            best = (true <= options.epsilon + 1e-12).nonzero()[:, 0]
            allowed = float(cost[0] - cost[int(best[-1])])
            found.append(
                {
                    "loss": loss, "method": method, "failed": failed,
                    "error": (failed * (1 - failed) / options.draws) ** 0.5,
                    "mean_risk": float(true[place].mean()), "mean_cost": float(cost[place].mean()),
                    "saving": saving, "of_plain": saving / plain_saving[loss], "of_possible": saving / allowed,
                    "nothing": float((place == 0).double().mean()),
                }
            )  # fmt: skip
            one = found[-1]
            print(
                f"{loss:14} {method:8} fails {100 * failed:5.1f} %  mean risk {100 * one['mean_risk']:.2f} %  "
                f"cost {one['mean_cost']:.3f}  saving {100 * one['of_plain']:.1f} % of plain's, "
                f"{100 * one['of_possible']:.1f} % of what the pool allows",
                flush=True,
            )
            meter.advance()
    value = {
        "trace": str(options.trace), "pool": trace.rows, "draws": options.draws, "rows": options.rows,
        "epsilon": options.epsilon, "delta": options.delta, "methods": found,
    }  # fmt: skip
    write_json(Path("results") / f"promises-{options.name}.json", value)


if __name__ == "__main__":
    main()
