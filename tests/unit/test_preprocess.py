"""From raw rows to inputs: the same as the libraries that models were trained with, and back from a folder."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offramp.errors import DataError, FormatError, ShapeError, ValueRangeError
from offramp.preprocess import FILE, ImagePreprocess, NumberPreprocess, TextPreprocess, load_preprocess

Image = pytest.importorskip("PIL.Image")


def picture(height: int = 40, width: int = 60, mode: str = "RGB") -> "Image.Image":
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def encoded(image: "Image.Image", kind: str = "PNG", **more: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def tokenizers_by_kind() -> dict[str, object]:
    """A WordPiece and a byte-level BPE tokenizer of transformers, made here."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    texts = ["a fine film with a plot", "the music was dull, and long", "an actor of charm"] * 5
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made: dict[str, object] = {}
    for kind, model, before, trainer in (
        ("wordpiece", models.WordPiece(unk_token="[UNK]"), pre_tokenizers.Whitespace(), trainers.WordPieceTrainer),
        ("bpe", models.BPE(unk_token="[UNK]"), pre_tokenizers.ByteLevel(), trainers.BpeTrainer),
    ):
        raw = Tokenizer(model)
        raw.pre_tokenizer = before
        raw.train_from_iterator(texts, trainer(vocab_size=200, special_tokens=special, show_progress=False))
        ids = [(name, raw.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
        raw.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
        )
        made[kind] = transformers.PreTrainedTokenizerFast(
            tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
            model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        )  # fmt: skip
    return made


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
@pytest.mark.parametrize("columns", [("text",), ("first", "second")])
def test_ids_are_those_of_transformers(tokenizers_by_kind, tmp_path: Path, kind: str, columns: tuple[str, ...]) -> None:
    tokenizer = tokenizers_by_kind[kind]
    made = TextPreprocess.of(tokenizer, columns, 12)
    made.save(tmp_path)
    texts = ["a fine film", "the music was dull " * 9, "ünïcode?", "x"]
    rows = [dict(zip(columns, (text, text[::-1]), strict=False)) for text in texts]
    expected = tokenizer(
        *[[row[name] for row in rows] for name in columns], padding=True, truncation=True, max_length=12,
        return_tensors="pt",
    )  # fmt: skip
    for one in (made, load_preprocess(tmp_path)):
        assert isinstance(one, TextPreprocess)
        found = one.batch(rows)
        assert set(found) == {"input_ids", "attention_mask", "token_type_ids"}
        assert all(torch.equal(found[name], expected[name]) for name in found)
        assert 1 in one.truncated(rows)
        assert 3 not in one.truncated(rows)
        ragged = one.examples(rows).batch(torch.arange(4)).inputs
        assert all(torch.equal(ragged[name], expected[name]) for name in found)


def test_texts_that_cannot_be_used(tokenizers_by_kind) -> None:
    made = TextPreprocess.of(tokenizers_by_kind["wordpiece"], ["text"], 12)
    assert made.check({"text": "fine"}) is None
    assert made.check({}) == "it has no 'text'"
    assert made.check({"text": " "}) == "its 'text' is empty"
    assert made.check({"text": 3}) == "its 'text' is int; expected a text"
    with pytest.raises(DataError, match="row 1 cannot be used: it has no 'text'"):
        made.batch([{"text": "fine"}, {}])
    with pytest.raises(ValueRangeError, match="leaves no room"):
        TextPreprocess.of(tokenizers_by_kind["wordpiece"], ["text"], 2)
    with pytest.raises(ValueRangeError, match="different names"):
        TextPreprocess.of(tokenizers_by_kind["wordpiece"], ["text", "text"], 12)


@pytest.mark.parametrize(
    "config",
    [
        {"size": {"height": 24, "width": 32}},
        {"size": {"shortest_edge": 24}, "do_center_crop": True, "crop_size": {"height": 20, "width": 20}},
        {
            "size": {"height": 24, "width": 24},
            "resample": 3,
            "image_mean": [0.1, 0.2, 0.3],
            "image_std": [1.0, 2.0, 3.0],
        },
        {"size": {"height": 24, "width": 24}, "do_normalize": False},
        {"size": {"height": 24, "width": 24}, "do_rescale": False, "do_normalize": False},
    ],
)
def test_images_are_those_of_transformers(config: dict[str, object]) -> None:
    pil = pytest.importorskip("transformers.image_transforms")
    made = ImagePreprocess.of(config, name="pixel_values")
    image = picture()
    values = np.asarray(image)
    size = config["size"]
    if "height" in size:
        values = pil.resize(values, (size["height"], size["width"]), resample=config.get("resample", 2))
    else:
        wanted = pil.get_resize_output_image_size(values, size["shortest_edge"], default_to_square=False)
        values = pil.resize(values, wanted, resample=2)
    if config.get("do_center_crop"):
        values = pil.center_crop(values, (20, 20))
    values = values.astype(np.float32)
    if config.get("do_rescale", True):
        values = values / 255
    if config.get("do_normalize", True):
        mean = config.get("image_mean", [0.0] * 3)
        values = (values - np.array(mean)) / np.array(config.get("image_std", [1.0] * 3))
    found = made.batch([{"image": encoded(image)}])["pixel_values"]
    assert torch.allclose(found[0], torch.tensor(values, dtype=torch.float32).permute(2, 0, 1), atol=1e-4)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1", "I;16"])
@pytest.mark.parametrize("wanted", ["RGB", "L"])
def test_images_of_every_mode_and_size(mode: str, wanted: str) -> None:
    image = Image.fromarray(np.full((30, 50), 40000, dtype=np.uint16)) if mode == "I;16" else picture(30, 50, mode)
    made = ImagePreprocess((16, 20), mode=wanted)
    raw = encoded(image, "TIFF" if mode in ("CMYK", "I;16") else "PNG")
    found = made.batch([{"image": raw}, {"image": {"bytes": encoded(picture(17, 90))}}])
    assert found.shape == (2, 3 if wanted == "RGB" else 1, 16, 20)
    assert found.min() >= -1
    assert found.max() <= 1
    if mode == "I;16":
        assert found[0].mean() == pytest.approx(2 * 40000 / 65535 - 1, abs=0.01)


def test_images_are_turned_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 10))
    image.paste((255, 255, 255), (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    turned = ImagePreprocess((20, 10), fit="stretch").pixels({"image": encoded(image, "JPEG", exif=exif)})
    assert turned[0, :8].float().mean() > 250
    assert turned[0, 12:].float().mean() < 5


def test_images_that_cannot_be_used(tmp_path: Path) -> None:
    made = ImagePreprocess((8, 8))
    (tmp_path / "cut.png").write_bytes(encoded(picture())[:200])
    (tmp_path / "words.png").write_text("no image")
    assert "cut.png is no image that can be read" in (made.check({"image": str(tmp_path / "cut.png")}) or "")
    assert "words.png is no image" in (made.check({"image": str(tmp_path / "words.png")}) or "")
    assert "does not exist" in (made.check({"image": str(tmp_path / "none.png")}) or "")
    assert "expected a path or the bytes" in (made.check({}) or "")
    huge = (
        b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + (60000).to_bytes(4) + (60000).to_bytes(4) + b"\x08\x02\0\0\0\0\0\0\0"
    )
    assert "no image that can be read" in (made.check({"image": huge}) or "")


def test_numbers(tmp_path: Path) -> None:
    rows = [{"a": i, "b": "3", "c": i * 0.5} for i in range(5)]
    made = NumberPreprocess.fitted(rows, ("a", "b", "c"))
    found = made.batch(rows)
    assert torch.allclose(found.mean(0), torch.zeros(3), atol=1e-6)
    assert torch.allclose(found.std(0, correction=0), torch.tensor([1.0, 0.0, 1.0]))
    made.save(tmp_path)
    assert load_preprocess(tmp_path) == made
    assert made.check({"a": 1, "b": "x", "c": 2}) == "its 'b' is 'x'; expected a finite number"
    assert made.check({"a": 1, "b": "nan", "c": 2}) is not None
    assert made.check({"a": 1, "b": 2}) == "it has no 'c'"
    with pytest.raises(ShapeError):
        NumberPreprocess(("a",), (0.0, 1.0), (1.0,))
    with pytest.raises(ValueRangeError):
        NumberPreprocess(("a",), (0.0,), (0.0,))


def test_damaged_folders(tokenizers_by_kind, tmp_path: Path) -> None:
    TextPreprocess.of(tokenizers_by_kind["wordpiece"], ["text"], 12).save(tmp_path)
    text = (tmp_path / FILE).read_text()
    for old, new in (
        ("12", "-1"),
        ('"text"', '"txet"'),
        ('"pad_id": 0', '"pad_id": "0"'),
        ('"version": 1', '"version": 2'),
    ):
        assert old in text
        (tmp_path / FILE).write_text(text.replace(old, new))
        if new == '"txet"':
            continue
        with pytest.raises(FormatError):
            load_preprocess(tmp_path)
    (tmp_path / FILE).write_text(text)
    good = (tmp_path / "tokenizer.json").read_text()
    for broken in (
        "",
        "{}",
        good[:-100],
        good.replace("WordPiece", "WordPeace"),
        "[" * 10_000,
    ):
        (tmp_path / "tokenizer.json").write_text(broken)
        with pytest.raises(FormatError, match=r"tokenizer\.json"):
            load_preprocess(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FormatError, match="missing"):
        load_preprocess(tmp_path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_value_in_any_field_is_read_or_one_error(tmp_path: Path, data: st.DataObject) -> None:
    of = data.draw(st.sampled_from(["image", "numbers"]))
    made = ImagePreprocess((8, 8)) if of == "image" else NumberPreprocess(("a", "b"), (0.0, 1.0), (1.0, 2.0))
    made.save(tmp_path)
    value = json.loads((tmp_path / FILE).read_text())
    place = data.draw(st.sampled_from([value, value["fields"]]))
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(VALUES)
    (tmp_path / FILE).write_text(json.dumps(value))
    try:
        assert load_preprocess(tmp_path).columns
    except FormatError:
        return
