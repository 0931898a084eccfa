"""Reading what users have: each mistake is named with its file, its line and a cure."""

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offramp.errors import DataError
from offramp.sources import balance, guess_columns, open_source, read_labelled, split_rows

HEAD = "text,label\n"
GOOD = HEAD + "".join(f"a film with {i} scenes,{'good' if i % 2 else 'bad'}\n" for i in range(20))


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def read(path: Path, **more: object):
    source = open_source(path)
    return read_labelled(source, guess_columns(source), **more)  # type: ignore[arg-type]


def test_the_same_rows_from_every_kind_of_file(tmp_path: Path) -> None:
    rows = [{"text": f"a film with {i} scenes", "label": "good" if i % 2 else "bad"} for i in range(20)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    files = [
        write(tmp_path / "a.csv", GOOD),
        write(tmp_path / "b.csv", "\ufeff" + GOOD.replace(",", ";")),
        write(tmp_path / "a.tsv", GOOD.replace(",", "\t")),
        write(tmp_path / "a.jsonl", lines),
        write(tmp_path / "a.json", json.dumps(rows)),
        write(tmp_path / "a.csv.gz", gzip.compress(GOOD.encode())),
        write(tmp_path / "crlf.csv", GOOD.replace("\n", "\r\n")),
    ]
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    for path in (*files, tmp_path / "a.parquet"):
        found = read(path)
        assert [row["text"] for row in found.rows] == [row["text"] for row in rows], path
        assert found.classes == ("bad", "good")
        assert found.labels is not None
        assert found.labels.tolist() == [i % 2 for i in range(20)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        (HEAD, "has no rows"),
        ("text,text\na,b\n", "names 'text' twice"),
        ("text,\na,b\n", "a column without a name"),
        (HEAD + "one,two,three\n", "line 2 of .* has 3 fields; the header has 2"),
        (HEAD + "a b c,good\nonly\n", "line 3 of .* has 1 fields"),
        (HEAD + '"never closed,good\na b c,bad\n', "cannot be read|fields"),
        (GOOD + "a b c,\n", "line 22 of .*: its 'label' is missing|its 'label' is empty"),
        (GOOD + ",good\n", "line 22 of .*: its 'text' is empty"),
        (HEAD + "a b c,0.73\nd e f,0.21\ng h i,0.5\n", "decimal numbers such as 0.73"),
        (HEAD + "a b c,good\nd e f,good\n", "all 2 rows of .* have the 'label' 'good'"),
        (HEAD + "a b c,good\n", "all 1 rows"),
        (HEAD + "".join(f"some words {i},name{i}\n" for i in range(40)), "40 different values in 40 rows"),
        (b"text,label\na caf\xe9 here,good\n", "line 2 of .* is not utf-8 \\(byte 0xe9"),
        (b"\xff\xfet\x00e\x00", "is not utf-8"),
    ],
)
def test_each_mistake_is_one_error(tmp_path: Path, text: str | bytes, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read(write(tmp_path / "x.csv", text))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ('{"text": "a b c", "label": 1}\n{"text": \n', "line 2 of .* is not JSON"),
        ('{"text": "a b c", "label": 1}\n[1]\n', "line 2 of .* is a JSON list"),
        ('{"text": "a b c", "label": 1}\n\n{"text": 3, "label": 2}\n', "line 3 of .*: its 'text' is int"),
        ('{"text": "a b c", "label": 1}\n{"label": 2}\n', "line 2 of .*: it has no 'text'"),
        ('{"text": "a b c", "label": null}\n', "its 'label' is missing"),
        ('{"text": "a b c", "label": [1]}\n{"text": "d e f", "label": 2}\n', "its 'label' is a list"),
        ("[" * 5000, "is not JSON"),
        ('[{"text": "a"', "is not JSON"),
    ],
)
def test_mistakes_of_json(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read(write(tmp_path / "x.jsonl", text))


def test_bad_rows_are_counted_and_left_out_only_when_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", GOOD + ",good\n\na b c,\n")
    with pytest.raises(DataError, match="2 row.s. cannot be used: line 22 .*; line 24 .*--skip-bad"):
        read(path)
    found = read(path, skip_bad=True)
    assert len(found.rows) == 20
    assert [bad.why for bad in found.bad] == ["its 'text' is empty", "its 'label' is empty"]
    assert any("1 blank line" in note for note in found.notes)


def test_columns_are_guessed_and_said(tmp_path: Path) -> None:
    def guess(content: str, **more: object):
        return guess_columns(open_source(write(tmp_path / "g.csv", content)), **more)  # type: ignore[arg-type]

    found = guess(GOOD)
    assert (found.kind, found.inputs, found.label) == ("text", ("text",), "label")
    assert all("by its name" in why for why in found.why)
    pairs = guess("premise,hypothesis,y\n" + "a b c,d e f,1\nx y z,u v w,0\n" * 5)
    assert pairs.inputs == ("premise", "hypothesis")
    numbers = guess("id,a,b,class\n" + "1,0.5,2,x\n2,0.25,3,y\n" * 5)
    assert (numbers.kind, numbers.inputs) == ("numbers", ("a", "b"))
    slip = guess("a,b,class\n" + "0.5,2,x\n0.25,3,y\n" * 20 + "0.5,many,x\n", text=["a", "b"])
    assert (slip.kind, slip.inputs) == ("numbers", ("a", "b"))
    unnamed = guess("said,kind\n" + "quite a long remark,x\nanother long remark,y\n" * 10)
    assert (unnamed.inputs, unnamed.label) == (("said",), "kind")
    with pytest.raises(DataError, match="no column 'txt'; it has 'text', 'label'. Did you mean 'text'"):
        guess(GOOD, text=["txt"])
    with pytest.raises(DataError, match="several columns of text, 'a', 'b'. Say which: --text"):
        guess("a,b,label\n" + "one two three,four five six,x\nseven eight nine,ten eleven twelve,y\n" * 4)
    with pytest.raises(DataError, match="Say which: --label"):
        guess("a,b\n" + "".join(f"{i}.5,{i}.25\n" for i in range(9)))


def test_labels_of_another_file_must_be_known(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", GOOD + "a b c,awful\n")
    with pytest.raises(DataError, match="line 22 .*'awful', which the model does not know; it knows 'bad', 'good'"):
        read(path, classes=("bad", "good"))


def test_numbers_as_labels_are_in_their_order(tmp_path: Path) -> None:
    lines = "".join(f"some words here,{i % 12}\n" for i in range(60))
    assert read(write(tmp_path / "x.csv", HEAD + lines)).classes == tuple(map(str, range(12)))
    floats = "".join(json.dumps({"text": "some words here", "label": float(i % 3)}) + "\n" for i in range(30))
    assert read(write(tmp_path / "x.jsonl", floats)).classes == ("0", "1", "2")


def test_parts_have_all_classes_and_no_row_twice(tmp_path: Path) -> None:
    lines = "".join(f"remark number {i % 150},{'rare' if i % 150 < 30 else 'usual'}\n" for i in range(300))
    found = read(write(tmp_path / "x.csv", HEAD + lines))
    parts = split_rows(found, seed=3)
    texts = [{row["text"] for row in part.rows} for part in parts]
    assert sum(len(part.rows) for part in parts) == 300
    assert not texts[0] & texts[1]
    assert not texts[0] & texts[2]
    assert not texts[1] & texts[2]
    assert all(len(part.labels.unique()) == 2 for part in parts if part.labels is not None)
    assert [p.fingerprint() for p in split_rows(found, seed=3)] == [p.fingerprint() for p in parts]
    assert split_rows(found, seed=4)[1].fingerprint() != parts[1].fingerprint()
    few = read(write(tmp_path / "y.csv", HEAD + "a b c,x\nd e f,y\n"))
    with pytest.raises(DataError, match="2 rows are too few"):
        split_rows(few)


def test_imbalance_is_said() -> None:
    assert "imbalanced" in balance(torch.tensor([0] * 90 + [1] * 10), ("no", "yes"))
    assert "imbalanced" not in balance(torch.tensor([0] * 50 + [1] * 50), ("no", "yes"))
    assert "yes has no rows" in balance(torch.tensor([0, 0]), ("no", "yes"))


def test_long_files_are_read_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    with open(path, "w", encoding="utf-8") as file:
        file.write(HEAD)
        for i in range(200_000):
            file.write(f"{'words of a row ' * 10}{i},{'good' if i % 2 else 'bad'}\n")
    assert path.stat().st_size > 30e6
    tracemalloc.start()
    count = sum(1 for _ in open_source(path).rows())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 200_000
    assert peak < 2e6


def test_folders_of_images_and_of_tables(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            for i in range(3):
                image.new("RGB", (9, 9), (i, i, i)).save(tmp_path / "pets" / split / name / f"{i}.png")
    source = open_source(tmp_path / "pets")
    assert source.splits == ("train", "test")
    found = read_labelled(source, guess_columns(source), split="test")
    assert found.classes == ("cat", "dog")
    assert len(found.rows) == 6
    assert open_source(tmp_path / "pets" / "train").splits == ()
    (tmp_path / "tables").mkdir()
    write(tmp_path / "tables" / "train.csv", GOOD)
    write(tmp_path / "tables" / "validation.csv", GOOD)
    assert open_source(tmp_path / "tables").splits == ("train", "validation")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        open_source(tmp_path / "empty")
    with pytest.raises(DataError, match="does not exist"):
        open_source(tmp_path / "nowhere.csv")
    with pytest.raises(DataError, match=r"ends in '\.txt'"):
        open_source(write(tmp_path / "a.txt", "x"))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300), st.sampled_from(["csv", "tsv", "jsonl", "json", "parquet", "csv.gz"]))
def test_any_bytes_are_rows_or_one_error(tmp_path: Path, data: bytes, kind: str) -> None:
    try:
        read(write(tmp_path / f"any.{kind}", data))
    except DataError:
        return


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_good_file_with_bytes_turned_is_rows_or_one_error(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(GOOD.encode())
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        read(write(tmp_path / "turned.csv", bytes(content)), skip_bad=data.draw(st.booleans()))
    except DataError:
        return
