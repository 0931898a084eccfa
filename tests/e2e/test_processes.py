"""Training and recording in several processes, as launchers start them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from offramp import ExitTrace

SCRIPT = """
import atexit, contextlib, json, pathlib, sys, time, warnings
import torch

def threads():
    for path in pathlib.Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            yield path.read_text().strip()

@atexit.register
def tell():
    until = time.monotonic() + 10  # a thread that was joined can be seen for a moment
    while any("gloo" in name for name in threads()) and time.monotonic() < until:
        time.sleep(0.01)
    sys.stderr.write(" ".join(["left at the end:", *threads()]) + "\\n")

warnings.simplefilter("ignore")
torch.set_num_threads(1)
from offramp import Recipe, attach, record, train
from offramp.processes import processes

torch.manual_seed(0)
network = torch.nn.Sequential(
    torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)
)
model = attach(network, at=("1",), example=torch.randn(3, 6))
made = torch.Generator().manual_seed(1)
x = torch.randn(101, 6, generator=made)
rows = (x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long())
recipe = Recipe(epochs=int(sys.argv[2]), batch_size=25, lr=1e-2, checkpoint_every_steps=2)
report = train(model, rows, recipe=recipe, validation=rows, checkpoint=sys.argv[1])
trace = record(model, rows, progress=False)
if processes().first:
    print(json.dumps({
        "losses": [epoch.loss for epoch in report.epochs], "accuracy": report.accuracy, "resumed": report.resumed_from,
        "logits": trace.logits.flatten().tolist(), "labels": trace.labels.tolist(), "ids": trace.ids[:3],
        "processes": processes().count,
    }))
"""
LAUNCH = [
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no",
    "--dynamo_backend", "no", "--num_processes",
]  # fmt: skip


def command(folder: Path, count: int, port: int, *rest: str) -> list[str]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    launched = [*LAUNCH, str(count), "--main_process_port", str(port)] if count > 1 else []
    return [sys.executable, *launched, str(script), *rest]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}


def free_port() -> int:
    import socket

    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def told(folder: Path, count: int, name: str, epochs: int = 3) -> dict:
    made = subprocess.run(
        command(folder, count, free_port(), str(folder / name), str(epochs)),
        capture_output=True, text=True, timeout=240, env=environment(), check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[-3000:]
    # a thread of gloo's that outlives the interpreter's lock aborts the process now and then
    left = [line for line in made.stderr.splitlines() if "left at the end:" in line]
    assert len(left) == count
    assert not any("gloo" in line for line in left), left
    return json.loads(made.stdout.strip().splitlines()[-1])


@pytest.mark.timeout(500)
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    one, two = (told(tmp_path, count, f"run{count}") for count in (1, 2))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert two["accuracy"] == pytest.approx(one["accuracy"], abs=0.011)
    torch.testing.assert_close(torch.tensor(two["logits"]), torch.tensor(one["logits"]), rtol=1e-4, atol=1e-5)
    assert two["labels"] == one["labels"]
    assert two["ids"] == one["ids"]


@pytest.mark.timeout(500)
def test_a_killed_process_ends_the_run_and_the_run_goes_on(tmp_path: Path) -> None:
    epochs = 200  # long enough to be killed before it ends, also on a busy machine
    whole = told(tmp_path, 1, "whole", epochs)
    started = subprocess.Popen(
        command(tmp_path, 2, free_port(), str(tmp_path / "run"), str(epochs)),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True,
    )  # fmt: skip
    try:
        kept, until = tmp_path / "run" / "train.safetensors", time.monotonic() + 120
        while not kept.exists() and time.monotonic() < until:
            time.sleep(0.02)
        assert kept.exists(), "nothing was saved"
        workers = [pid for pid in children(started.pid) if "script.py" in Path(f"/proc/{pid}/cmdline").read_text()]
        os.kill(max(workers), signal.SIGKILL)
        _, errors = started.communicate(timeout=120)
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
    assert started.returncode != 0
    assert errors.count("another process of this run ended, or cannot be reached") == 1, errors[-3000:]
    again = told(tmp_path, 2, "run", epochs)
    assert again["resumed"], "it began anew"
    assert again["losses"] == pytest.approx(whole["losses"], rel=1e-3)
    torch.testing.assert_close(torch.tensor(again["logits"]), torch.tensor(whole["logits"]), rtol=1e-2, atol=1e-3)


@pytest.mark.timeout(500)
def test_the_command_line_trains_and_records_in_two_processes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    launch = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()),
        "-m", "offramp",
    ]  # fmt: skip
    alone = [sys.executable, "-m", "offramp"]
    for words in (
        [*launch, "train", "digits", "--epochs", "1", "--limit", "200", "--out", str(run)],
        [*launch, "record", str(run), "--split", "test"],
        [*alone, "record", str(run), "--split", "test", "--out", str(tmp_path / "alone.safetensors")],
    ):
        made = subprocess.run(words, capture_output=True, text=True, timeout=240, env=environment(), check=False)
        assert made.returncode == 0, made.stderr[-3000:]
        assert made.stdout.count("wrote ") == 1, made.stdout  # one process tells
    together, one = (ExitTrace.load(path) for path in (run / "test.safetensors", tmp_path / "alone.safetensors"))
    torch.testing.assert_close(together.logits, one.logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(together.known_labels("this"), one.known_labels("this"))
    assert together.ids == one.ids


def children(pid: int) -> list[int]:
    """Every process that a process started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError, ValueError):
                continue
            if parent == pid:
                found += [int(entry.name), *children(int(entry.name))]
    return found
