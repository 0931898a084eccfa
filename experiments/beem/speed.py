"""Measured speed of exits that `run.py` trained, and how right they are beside the network fine-tuned without exits.

    python -m experiments.beem.speed sst2 --data DIR          # some minutes; the machine should be idle

Policies are calibrated on one half of the held-out rows and run live on the other, in ONNX Runtime at batch 1 and 32,
against the same network without exits in ONNX Runtime: to half of the FLOPs, to 42 % on SST-2 and 60 % elsewhere, and
to a little under plain on the calibration rows (0.3 points on SST-2; elsewhere half a point, or a standard error of the
task's metric where that is more). All in a session for each stage; on SST-2 the policies that lead also in one file
with everything in it. Writes results/beem/speed-TASK.json and speed-TASK-file.json, cell by cell; given again, it goes
on.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from experiments.beem.cells import VARIANTS, folder_of, network_of, rows_of
from experiments.beem.run import BEST, PLAIN
from experiments.judge import Cells, NearPlain, alone, digest_of, margin_of, told
from safetensors.torch import load_file

import offramp
from offramp import Budget, MaxDrop
from offramp.artefacts import read_json, write_json
from offramp.bench import Bench, Plan, Subject, bench
from offramp.bench.apart import Opener
from offramp.checkpoints import named_tensors
from offramp.choices import calibrator_of
from offramp.policies import from_dict, to_dict
from offramp.pools import Pool
from offramp.splits import stratified_split
from offramp.sweep import Sweep
from offramp.tasks import TEXT_TASKS

FAMILIES = ("max-prob", "ztw", "beem-a", "stopping")
IN_ONE_FILE = ("max-prob", "stopping")
WHOLE = ("sst2", "sst2-full")  # with every target, and in one file too


def calibrated(task: str, seed: int, out: Path) -> None:
    """Nothing; the file has the policies, and what each answers to the other half beside the plain network."""
    cells = Cells()
    got, other = cells(task, BEST, seed), cells(task, PLAIN, seed)
    if got is None or other is None:
        raise SystemExit(f"{task} is not trained yet: python -m experiments.beem.run --data DIR --only {task}")
    of = {name: cells.told[f"{task}-{name}-{seed}"]["weights_sha256"] for name in (BEST, PLAIN)}
    ours = Path(offramp.__file__).parent
    of["code"] = digest_of(ours / "calibrate", ours / "policies")
    before = read_json(out) if out.exists() else {"of": {}, "policies": []}
    if before["of"] == of:
        return
    trace, costs = got
    metric = TEXT_TASKS[task.removesuffix("-full")].metric
    margin = margin_of(task, other[0], metric)
    fit, test = stratified_split(trace.known_labels("halves"), (0.5, 0.5))
    pool = Pool(trace.select(fit), trace.select(test), test)
    plain = alone(other[0], other[0].exits - 1)["right"]
    targets: dict[str, Budget | MaxDrop] = {"half": Budget(fraction=0.5)}
    targets |= {"two fifths": Budget(fraction=0.42)} if task in WHOLE else {"three fifths": Budget(fraction=0.6)}
    targets["near plain"] = NearPlain(other[0], margin, metric).of(pool)
    rows = []
    for family in FAMILIES:
        calibrator, sweep = calibrator_of(family, pool.fit, costs), Sweep(pool.test, costs)
        for name, target in targets.items():
            made = calibrator.to(target, None)
            said = sweep(made.policy)
            right = (said.said == sweep.trace.known_labels("halves")).double()
            rows.append({
                "policy": f"{family}, {name}", "status": made.status, "target": str(target), "counted": 1 / said.cost,
                "value": to_dict(made.policy),
                **told({"right": right, "accuracy": float(right.mean())}, plain={"right": plain[test]}),
            })  # fmt: skip
    same = all(before["of"].get(name) == of[name] for name in (BEST, PLAIN))
    known = {each["policy"]: each["value"] for each in before["policies"]} if same else {}
    forget(timed_at(out), {each["policy"] for each in rows if known.get(each["policy"]) != each["value"]})
    write_json(out, {"of": of, "margin": margin, "metric": metric, "policies": rows})


def forget(timed: Sequence[Path], policies: set[str]) -> None:
    """Nothing; the files have no times of these policies any more, which are others by now."""
    for path in filter(Path.exists, timed):
        found = Bench.of(read_json(path))
        settings = {name: each for name, each in found.settings.items() if name.removeprefix("policy ") not in policies}
        cells = tuple(each for each in found.cells if each.policy not in policies)
        write_json(path, replace(found, settings=settings, cells=cells).to_dict())


def timed_at(beside: Path) -> tuple[Path, Path]:
    """Where times are kept: of a session for each stage, and of one file with everything in it."""
    apart = beside.with_name(beside.name.replace("beside-", "speed-"))
    return apart, apart.with_stem(f"{apart.stem}-file")


def subject(task: str, seed: int, data: str, runs: str, policies: str) -> Subject:
    """The network, and the half of the rows that no policy was calibrated on."""
    model, tokenizer = network_of(task, VARIANTS[BEST], seed)
    saved = load_file(folder_of(task, BEST, seed, Path(runs)) / "model.safetensors")
    with torch.no_grad():
        for name, tensor in named_tensors(model):
            tensor.copy_(saved[name])
    _, held_out = rows_of(task, Path(data), tokenizer)
    _, test = stratified_split(held_out.labels, (0.5, 0.5))
    named = {each["policy"]: (from_dict(each["value"]), "fp32") for each in read_json(policies)["policies"]}
    return Subject(model.eval(), held_out.select(test), named=named, title=f"MiniLM, six exits, {task}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/beem"))
    parser.add_argument("--seconds", type=float, default=20.0, help="for each cell: 36 of SST-2, 24 of the others")
    options = parser.parse_args()
    beside = Path("results/beem") / f"beside-{options.task}.json"
    out, whole = timed_at(beside)
    print("calibrating ...", flush=True)
    calibrated(options.task, options.seed, beside)
    arguments = {"task": options.task, "seed": options.seed, "data": str(options.data.resolve()),
                 "runs": str(options.runs.resolve()), "policies": str(beside.resolve())}  # fmt: skip
    opener = Opener("experiments.beem.speed:subject", arguments)
    names = tuple(each["policy"] for each in read_json(beside)["policies"])
    leading = tuple(name for name in names if name.startswith(IN_ONE_FILE))
    ways = [("onnx", names, out), ("onnx-file", leading, whole)]
    for engine, asked, path in ways if options.task in WHOLE else ways[:1]:
        plan = Plan(engines=(engine,), batch_sizes=(1, 32), policies=asked, seconds=options.seconds, threads=1)
        found = bench(opener(), plan, opener=opener, out=path)
        for cell in found.cells:
            what = f"{cell.speedup:.2f}x, right {cell.accuracy.value:.3f}"
            print(f"{engine:10} {cell.policy:24} batch {cell.batch_size:3}: {what}", flush=True)


if __name__ == "__main__":
    main()
