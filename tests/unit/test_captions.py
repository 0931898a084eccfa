"""Images with captions in the layouts that people have."""

import io
import json
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("datasets")

from offramp.captions import load_captions
from offramp.errors import DataError
from offramp.preprocess import ImagePreprocess


def png(shade: int) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def karpathy(root: Path) -> Path:
    (root / "val2014").mkdir()
    entries = []
    for i, split in enumerate(("train", "restval", "val", "test")):
        (root / "val2014" / f"{i}.png").write_bytes(png(i * 50))
        said = [{"raw": f"Image {i}, first."}, {"raw": f"Image {i}, second."}]
        entries.append(
            {"filepath": "val2014" if i else "elsewhere", "filename": f"{i}.png", "split": split, "sentences": said}
        )
    (root / "dataset_coco.json").write_text(json.dumps({"images": entries}))
    return root


def listed(root: Path) -> Path:
    (root / "Images").mkdir()
    lines = ["image,caption"]
    for i in range(10):
        (root / "Images" / f"{i}.png").write_bytes(png(i * 20))
        lines += [f'{i}.png,"A thing, number {i}"', f"{i}.png,Number {i}"]
    (root / "captions.txt").write_text("\n".join(lines))
    return root


def parquet(root: Path, columns: str) -> Path:
    from datasets import Dataset

    said = [["one thing", "a thing"], ["two things"]]
    rows = [{"image": {"bytes": png(i * 90), "path": None}} for i in range(2)]
    for row, each in zip(rows, said, strict=True):
        if columns == "captions":
            row["captions"] = each
        else:
            row |= {f"caption_{j}": (each * 2)[j] for j in range(2)}
    Dataset.from_list(rows).to_parquet(str(root / "test.parquet"))
    return root


def test_karpathys_splits(tmp_path: Path) -> None:
    root = karpathy(tmp_path)
    train = load_captions(root, "train")
    assert len(train) == 2
    assert train.captions[1] == ("Image 1, first.", "Image 1, second.")
    assert len(load_captions(root, "validation")) == len(load_captions(root, "test")) == 1
    (root / "val2014" / "3.png").unlink()
    with pytest.raises(DataError, match=r"names 3.png, which is not in"):
        load_captions(root, "test")
    with pytest.raises(DataError, match="has no image in the split 'none'"):
        load_captions(root, "none")


def test_a_list_of_captions_is_dealt_by_seed(tmp_path: Path) -> None:
    root = listed(tmp_path)
    parts = [load_captions(root, split) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [8, 1, 1]
    assert len({str(image) for part in parts for image in part.images}) == 10
    assert all(len(said) == 2 for part in parts for said in part.captions)
    assert (
        load_captions(root, "test", seed=1).images != parts[2].images
        or load_captions(root, "test", seed=2).images != parts[2].images
    )


@pytest.mark.parametrize("columns", ["captions", "caption_0"])
def test_the_hubs_layouts(tmp_path: Path, columns: str) -> None:
    found = load_captions(parquet(tmp_path, columns), "test")
    assert [len(each) for each in found.captions] == ([2, 1] if columns == "captions" else [2, 2])
    images = ImagePreprocess((8, 8), name="pixel_values")
    rows = found.rows(lambda text: [2 + len(word) for word in text.split()], begin=0, end=1, preprocess=images)
    assert len(rows) == sum(map(len, found.captions))
    batch = rows.batch(torch.arange(len(rows)))
    assert batch.inputs["pixel_values"].shape == (len(rows), 3, 8, 8)
    assert rows.row(0) == [0, 5, 7, 1]
    with pytest.raises(DataError, match="has the splits test; got 'train'"):
        load_captions(tmp_path, "train")
    with pytest.raises(DataError, match="give preprocess="):
        found.rows(lambda text: [2], begin=0, end=1)


def test_an_image_that_is_none_is_named(tmp_path: Path) -> None:
    root = listed(tmp_path)
    for path in (root / "Images").iterdir():
        path.write_text("no image")
    with pytest.raises(DataError, match=r"image 0: .* is no image that can be read"):
        load_captions(root, "train").pixels(ImagePreprocess((8, 8)))


@pytest.mark.skipif("OFFRAMP_DATA" not in os.environ, reason="OFFRAMP_DATA names no folder of data sets")
def test_flickr8k() -> None:
    found = load_captions(Path(os.environ["OFFRAMP_DATA"]) / "flickr8k_1k", "validation")
    assert len(found) == 113
    assert all(len(each) == 5 for each in found.captions)
    assert found.pixels(ImagePreprocess((32, 32))).shape == (113, 3, 32, 32)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('image,caption\n0.png,"one\n1.png,two\n', "line 3: unexpected end of data. Is a quote not closed"),
        ("image,caption\n0.png\n", "line 2: there is no image, or no caption"),
        ("file\tcaption\n0.png\tone\n", "expected a line 'image,caption'"),
        ("", "begins with nothing"),
        ("image,caption\n0.png,caf\xe9\n", "is not UTF-8"),
    ],
)
def test_lists_that_cannot_be_read(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "captions.txt").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=why):
        load_captions(tmp_path, "train")


def test_lists_as_people_write_them(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png(0))
    text = '\ufeffimage, caption\n0.png, one,two,three\n\n0.png,"a ""thing"", too"\n'
    (tmp_path / "captions.txt").write_text(text, encoding="utf-8")
    assert load_captions(tmp_path, "train").captions == (("one,two,three", 'a "thing", too'),)
    (tmp_path / "captions.txt").write_text("caption,split,image\none,train,0.png\n", encoding="utf-8")
    assert load_captions(tmp_path, "train").captions == (("one",),)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ({"images": {}}, "has no list of images"),
        ({"images": ["a"]}, "image 0 has another shape"),
        ({"images": [{"split": "train", "sentences": []}]}, "image 0 has no 'filename'"),
        ({"images": [{"split": "train", "filename": "a", "sentences": [{}]}]}, "image 0 has no 'raw'"),
        ({"images": [{"split": "train", "filename": "a", "sentences": [{"raw": None}]}]}, "a caption that is no text"),
    ],
)
def test_karpathys_files_that_cannot_be_read(tmp_path: Path, value: object, why: str) -> None:
    (tmp_path / "dataset_coco.json").write_text(json.dumps(value))
    with pytest.raises(DataError, match=why):
        load_captions(tmp_path, "train")


def test_rows_of_the_hubs_layouts(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "b.png").write_bytes(png(90))

    def read(name: str, rows: list[dict[str, object]]) -> tuple[tuple[str, ...], ...]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return load_captions(tmp_path / name, "train").captions

    a, b = str(tmp_path / "a.png"), str(tmp_path / "b.png")
    rows = [{"image": a, "caption": "one"}, {"image": b, "caption": "two"}, {"image": a, "caption": "three"}]
    assert read("each", rows) == (("one", "three"), ("two",))
    rows = [{"image": a, "caption_0": "x", "caption_1": None, "caption_url": "http://x"}]
    assert read("numbered", rows) == (("x",),)
    with pytest.raises(DataError, match="row 0 has a caption that is no text"):
        read("number", [{"image": a, "caption": 5}])


def test_images_of_one_name_stay_apart(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [{"image": {"bytes": png(i % 2 * 90), "path": "image.png"}, "caption": f"number {i}"} for i in range(4)]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "test.parquet"))
    found = load_captions(tmp_path, "test")
    assert found.captions == (("number 0", "number 2"), ("number 1", "number 3"))
