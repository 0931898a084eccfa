"""A training that is killed without warning ends, when it is started again, as if nothing had happened."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

UNIT = pathlib.Path(__file__).parents[1] / "unit"

WORKER = """
import json, sys, time
import torch
from safetensors.torch import save_file
from tiny_model import made, rows
from offramp.augment import CropFlip
from offramp.data import Examples
from offramp.recipe import Recipe
from offramp.train import train

torch.set_num_threads(1)
folder, slow = sys.argv[1], float(sys.argv[2])

def noise(inputs, generator):
    time.sleep(slow)
    return inputs + 0.05 * torch.randn(inputs.shape, generator=generator)

recipe = Recipe(epochs=3, batch_size=8, lr=0.02, augment=noise, checkpoint_every_steps=4)
model = made()
report = train(model, rows(160), recipe=recipe, validation=rows(60, seed=2), checkpoint=folder, progress=False)
save_file({k: v.contiguous().clone() for k, v in model.state_dict().items()}, folder + "/final.safetensors")
print(json.dumps(report.to_dict()))
"""


def start(folder, slow):
    env = {**os.environ, "PYTHONPATH": str(UNIT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WORKER, str(folder), str(slow)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def step_of(path):
    """The step of a checkpoint, 0 before there is one; it must be whole whenever it is looked at."""
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["offramp"])["place"]["step"]


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is not there on Windows")
def test_sigkill_in_the_middle_of_an_epoch(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    steady, first = start(whole, 0.0), start(killed, 0.05)
    path, until = killed / "train.safetensors", time.monotonic() + 120
    try:
        # 20 steps an epoch, a checkpoint every 4: at 24 the second epoch is under way
        while step_of(path) < 24:
            assert first.poll() is None, first.stderr.read()
            assert time.monotonic() < until
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL
    except SafetensorError as error:
        pytest.fail(f"a half-written checkpoint was visible: {error}")
    finally:
        first.kill()
        first.communicate()
    assert not (killed / "final.safetensors").exists()
    left = step_of(path)
    assert 24 <= left < 60
    second = start(killed, 0.0)
    reports = []
    for process in (steady, second):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        reports.append(json.loads(out))
    expected, got = reports
    assert expected["resumed_from"] is None
    assert got["resumed_from"] == left
    assert got["steps"] == expected["steps"] == 60
    for a, b in zip(expected["epochs"], got["epochs"], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["accuracy"] == pytest.approx(a["accuracy"], abs=1e-6)
        assert b["rows"] == a["rows"] == 160
    ours, theirs = load_file(killed / "final.safetensors"), load_file(whole / "final.safetensors")
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6)
