import json
import os
import subprocess
import sys

import pytest

from offramp.artefacts import clear_partial, read_json, write_atomically, write_json
from offramp.errors import FormatError


def test_round_trip(tmp_path):
    path = write_json(tmp_path / "a" / "v.json", {"x": [1, 0.1, "ä", None]})
    assert read_json(path) == {"x": [1, 0.1, "ä", None]}
    assert os.listdir(path.parent) == ["v.json"]


def test_a_failing_write_leaves_the_old_file_whole(tmp_path):
    path = write_json(tmp_path / "v.json", {"old": 1})

    def half(partial):
        partial.write_text('{"new"')
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, half)
    for bad in ({"x": float("nan")}, {"x": float("inf")}, {"x": object()}):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, bad)
    assert read_json(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["v.json"]


def test_a_killed_write_leaves_the_old_file_whole(tmp_path):
    path = write_json(tmp_path / "v.json", {"old": 1})
    script = (
        "import os, signal, sys\nfrom offramp.artefacts import write_atomically\n"
        "def half(partial):\n    partial.write_text('{')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomically(sys.argv[1], half)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(path)], timeout=120).returncode == -9
    assert read_json(path) == {"old": 1}
    write_json(path, {"new": 2})
    assert read_json(path) == {"new": 2}


def test_what_a_writer_leaves_beside_its_file_goes_too(tmp_path):
    def careless(partial):  # as safetensors, which renames a file of its own
        (partial.parent / ".tmpAbC").write_text("half")
        partial.write_text("{}")

    write_atomically(tmp_path / "v.json", careless)
    assert os.listdir(tmp_path) == ["v.json"]


def test_what_a_killed_process_left_is_cleared_and_what_a_running_one_fills_is_not(tmp_path):
    dead, alive = (tmp_path / f".v.json.1.{pid}.partial" for pid in (2**22 + 1, os.getpid()))
    other = tmp_path / f".w.json.1.{2**22 + 1}.partial"
    for folder in (dead, alive, other):
        folder.mkdir()
        (folder / "v.json").write_text("half")
    clear_partial(tmp_path / "v.json")
    assert sorted(tmp_path.iterdir()) == sorted([alive, other])


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"1", b"null", b"\xff\xfe", b'{"a": 1'])
def test_no_json_object(tmp_path, content):
    path = tmp_path / "v.json"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"v\.json"):
        read_json(path)


def test_no_file(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(FormatError):
            read_json(path)
    assert json.loads("{}") == {}


def test_numbers_and_nesting_too_large_to_read_are_one_clear_error(tmp_path):
    for text in ('{"a": ' + "9" * 5000 + "}", "[" * 100_000):
        (tmp_path / "big.json").write_text(text)
        with pytest.raises(FormatError, match="not readable as JSON"):
            read_json(tmp_path / "big.json")
