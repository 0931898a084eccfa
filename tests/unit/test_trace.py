import json

import pytest
import torch
from safetensors.torch import save_file

from offramp.errors import DataError, FormatError, ShapeError, ValueRangeError
from offramp.trace import ExitTrace


def trace(rows: int = 40, **more) -> ExitTrace:
    g = torch.Generator().manual_seed(0)
    return ExitTrace(torch.randn(3, rows, 4, generator=g), labels=torch.arange(rows) % 4, **more)


def unchecked(logits, **more) -> ExitTrace:
    """A trace made as a user makes it: without the check of annotations that the test suite switches on."""
    made = object.__new__(ExitTrace)
    getattr(ExitTrace.__init__, "__wrapped__", ExitTrace.__init__)(made, logits, **more)
    return made


def test_sizes_and_accuracy():
    made = ExitTrace(torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]]), labels=torch.tensor([0, 1]))
    assert (made.exits, made.rows, made.classes) == (2, 2, 2)
    assert made.accuracy() == (0.5, 1.0)


def test_logits_become_float32():
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        assert ExitTrace(torch.zeros(1, 2, 3, dtype=dtype)).logits.dtype == torch.float32
    made = ExitTrace(torch.zeros(1, 2, 3, requires_grad=True), labels=torch.tensor([0, 2], dtype=torch.int32))
    assert not made.logits.requires_grad
    assert made.labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("logits", "labels", "error", "words"),
    [
        (torch.zeros(2, 3), None, ShapeError, "exit row cls"),
        (torch.zeros(2, 3, 4, 5), None, ShapeError, "expected 3 axes"),
        (torch.zeros(2, 3, 4, dtype=torch.int64), None, ShapeError, "expected floats"),
        (torch.zeros(2, 0, 4), None, DataError, "no rows"),
        (torch.zeros(0, 3, 4), None, ShapeError, "at least 1 exit"),
        (torch.zeros(2, 3, 0), None, ShapeError, "1 class"),
        (torch.zeros(1, 3, 2), torch.zeros(3), ShapeError, "integer dtype"),
        (torch.zeros(1, 3, 2), torch.zeros(3, dtype=torch.bool), ShapeError, "integer dtype"),
        (torch.zeros(1, 3, 2), torch.zeros(2, dtype=torch.int64), ShapeError, "one label per row"),
        (torch.zeros(1, 3, 2), torch.zeros(3, 1, dtype=torch.int64), ShapeError, "one label per row"),
        (torch.zeros(1, 3, 2), torch.tensor([0, 1, 2]), ValueRangeError, "0 to 2; expected 0 to 1"),
        (torch.zeros(1, 3, 2), torch.tensor([0, -1, 1]), ValueRangeError, "from -1"),
        (torch.full((1, 3, 2), 1e300, dtype=torch.float64), None, ValueRangeError, "NaN or infinite"),
    ],
)
def test_what_is_wrong_is_named(logits, labels, error, words):
    with pytest.raises(error, match=words):
        unchecked(logits, labels=labels)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_logits_are_located(bad):
    logits = torch.zeros(2, 3, 4)
    logits[1, 2, 3] = bad
    with pytest.raises(ValueRangeError, match=r"1 values .* first at \[1, 2, 3\]"):
        ExitTrace(logits)


def test_signals_and_ids():
    made = trace(2, signals=torch.zeros(3, 2, 5, dtype=torch.float64), ids=("a", "b"))
    assert made.signals.dtype == torch.float32
    for signals in (torch.zeros(3, 2), torch.zeros(2, 2, 5), torch.zeros(3, 1, 5)):
        with pytest.raises(ShapeError, match="signals"):
            unchecked(torch.zeros(3, 2, 4), signals=signals)
    with pytest.raises(ShapeError, match="ids"):
        trace(2, ids=("a",))
    with pytest.raises(DataError, match="labels"):
        ExitTrace(torch.zeros(1, 2, 2)).accuracy()


def test_select():
    made = trace(6, ids=tuple("abcdef"), signals=torch.arange(18.0).reshape(3, 6, 1), source="s")
    some = made.select(torch.tensor([4, 0, 4]))
    assert some.ids == ("e", "a", "e")
    assert torch.equal(some.logits, made.logits[:, [4, 0, 4]])
    assert some.labels.tolist() == [0, 0, 0]
    assert some.signals[1, :, 0].tolist() == [10, 6, 10]
    assert some.source == "s"
    flags = made.labels == 1
    assert made.select(flags).ids == ("b", "f")
    with pytest.raises(ShapeError, match="one flag per row"):
        made.select(flags[:4])
    with pytest.raises(DataError, match="no rows"):
        made.select(torch.zeros(6, dtype=torch.bool))


def test_split():
    made = trace(200, ids=tuple(map(str, range(200))))
    parts = made.split((0.4, 0.3, 0.3), seed=1)
    assert [p.rows for p in parts] == pytest.approx([80, 60, 60], abs=4)
    every = [i for p in parts for i in p.ids]
    assert sorted(every, key=int) == list(made.ids)
    assert [p.ids for p in made.split(seed=1)] == [p.ids for p in parts]
    assert [p.ids for p in made.split(seed=2)] != [p.ids for p in parts]
    assert sum(p.rows for p in ExitTrace(made.logits).split((1,))) == 200


def test_round_trip(tmp_path):
    for made in (trace(5, ids=("ä", "b", "c", "d", '"e"'), source="test rows"), trace(5, signals=torch.ones(3, 5, 2)),
                 ExitTrace(torch.randn(4, 2, 3).transpose(0, 1))):  # fmt: skip
        again = ExitTrace.load(made.save(tmp_path / "deep" / "t.safetensors"))
        assert torch.equal(again.logits, made.logits)
        assert (again.ids, again.source) == (made.ids, made.source)
        for name in ("labels", "signals"):
            ours, theirs = getattr(made, name), getattr(again, name)
            assert theirs is None if ours is None else torch.equal(ours, theirs)
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["t.safetensors"]


GOOD = {"logits": torch.zeros(2, 3, 4), "labels": torch.zeros(3, dtype=torch.int64)}
KIND = {"kind": "offramp.trace", "version": "1"}


@pytest.mark.parametrize(
    ("tensors", "about"),
    [
        (GOOD, {}),
        (GOOD, {**KIND, "kind": "other"}),
        (GOOD, {**KIND, "version": "2"}),
        ({**GOOD, "extra": torch.zeros(1)}, KIND),
        ({"labels": GOOD["labels"]}, KIND),
        ({**GOOD, "labels": torch.full((3,), 9)}, KIND),
        ({**GOOD, "labels": torch.zeros(2, dtype=torch.int64)}, KIND),
        ({"logits": torch.full((2, 3, 4), float("nan"))}, KIND),
        ({"logits": torch.zeros(2, 3)}, KIND),
        ({"logits": torch.zeros(2, 0, 4)}, KIND),
        (GOOD, {**KIND, "ids": "5"}),
        (GOOD, {**KIND, "ids": "{"}),
        (GOOD, {**KIND, "ids": json.dumps(["a"])}),
        (GOOD, {**KIND, "ids": "[" * 100_000}),
    ],
    ids=range(14),
)
def test_foreign_and_newer_files(tmp_path, tensors, about):
    path = tmp_path / "t.safetensors"
    save_file(tensors, path, metadata=about or None)
    with pytest.raises(FormatError, match=r"t\.safetensors"):
        ExitTrace.load(path)


def test_truncated_missing_and_other_files(tmp_path):
    path = trace().save(tmp_path / "t.safetensors")
    whole = path.read_bytes()
    for cut in (0, 1, 7, 8, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(FormatError):
            ExitTrace.load(path)
    path.write_text("{}")
    for bad in (path, tmp_path, tmp_path / "none"):
        with pytest.raises(FormatError):
            ExitTrace.load(bad)
