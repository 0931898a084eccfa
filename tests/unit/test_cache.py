"""Files that are kept between runs: damaged ones are made again, others' are left alone, the unused leave first."""

import os
from concurrent.futures import ThreadPoolExecutor

from offramp import cache
from offramp.cache import kept_file


def test_a_damaged_cache_is_made_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path / "kept"))
    made = []

    def make(path):
        made.append(1)
        path.write_bytes(b"whole")

    path = kept_file("x.onnx", "key", make)
    assert kept_file("x.onnx", "key", make) == path
    assert len(made) == 1
    path.write_bytes(b"who")
    assert kept_file("x.onnx", "key", make).read_bytes() == b"whole"
    assert len(made) == 2
    assert "damaged" in capsys.readouterr().err
    assert kept_file("x.onnx", "other", make) != path


def test_only_files_of_ours_leave_and_the_unused_first(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "MOST_BYTES", 250)
    thesis = tmp_path / "thesis.docx"
    thesis.write_bytes(bytes(10_000))
    os.utime(thesis, (1, 1))
    paths = []
    for number, name in enumerate(("a", "b")):
        paths.append(kept_file(name, "key", lambda path: path.write_bytes(bytes(100))))
        os.utime(paths[-1], (10 + number, 10 + number))
    kept_file("a", "key", lambda path: path.write_bytes(b""))  # used, so "b" is the one that was not for longest
    newest = kept_file("c", "key", lambda path: path.write_bytes(bytes(100)))
    assert thesis.stat().st_size == 10_000
    assert paths[0].exists()
    assert newest.exists()
    assert not paths[1].exists()
    assert len(list(tmp_path.iterdir())) == 1 + 2 * 2  # digests leave with their files


def test_threads_that_make_the_same_file_do_not_meet(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path))
    contents = os.urandom(1 << 20)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: kept_file("x", "key", lambda path: path.write_bytes(contents)), range(24)))
    assert {path.read_bytes() for path in found} == {contents}
