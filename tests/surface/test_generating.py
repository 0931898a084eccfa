"""Bundles that generate, and the commands that use them."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

transformers = pytest.importorskip("transformers")
pytest.importorskip("PIL")
pytest.importorskip("tokenizers")

from offramp.bundle import Bundle  # noqa: E402
from offramp.cli import app  # noqa: E402
from offramp.errors import DataError, FormatError, ShapeError, ValueRangeError  # noqa: E402
from offramp.generation import (  # noqa: E402
    Draft,
    Sampling,
    TokenBundle,
    TokenPolicy,
    attach_tokens,
    generate,
    resnet_encoder,
)
from offramp.policies import MaxProb  # noqa: E402
from offramp.preprocess import ImagePreprocess  # noqa: E402

WORDS = ("<s>", "</s>", "a", "frog", "above", "truck", "and", "left", "of", "ship", "cat", "dog")
LAYERS = 4
run = CliRunner()


def tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({f"\u2581{word}" if i > 1 else word: i for i, word in enumerate(WORDS)},
                                      unk_token="</s>"))  # fmt: skip
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def loud(network: Any) -> Any:
    for parameter in network.parameters():
        parameter.data *= 1.0 if parameter.ndim < 2 else 8.0
    return network.eval()


def writer() -> TokenBundle:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_positions=64, n_embd=32, n_layer=LAYERS, n_head=4, vocab_size=len(WORDS), bos_token_id=0, eos_token_id=1
    )
    model = attach_tokens(loud(transformers.GPT2LMHeadModel(config)), at=(0, 2), head="factorised", rank=8)
    model.gates = torch.nn.ModuleList(torch.nn.Linear(32, 1) for _ in model.at)
    policy = TokenPolicy(MaxProb((0.12, 0.12, 0.0)), decay=4.0, gate=0.1)
    return TokenBundle(model, tokenizer(), policy, draft=Draft(1, 3), about={"text": "a test"})


def captioner() -> TokenBundle:
    torch.manual_seed(0)
    config_class, encoder_class = resnet_encoder()
    decoder = transformers.GPT2Config(
        n_positions=64, n_embd=32, n_layer=LAYERS, n_head=4, vocab_size=len(WORDS), bos_token_id=0, eos_token_id=1,
        add_cross_attention=True, is_decoder=True,
    )  # fmt: skip
    network = transformers.VisionEncoderDecoderModel(
        encoder=encoder_class(config_class(blocks=1, grid=2)), decoder=loud(transformers.GPT2LMHeadModel(decoder))
    )
    network.enc_to_dec_proj.weight.data *= 6
    images = ImagePreprocess((32, 32), name="pixel_values")
    return TokenBundle(
        attach_tokens(network, head="shared"), tokenizer(), TokenPolicy(MaxProb((0.4,) * LAYERS)), images
    )


def image(red: int, kind: str = "PNG") -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.effect_noise((40, 40), 80).convert("RGB").point(lambda x: min(255, x + red)).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bundles")
    for i in range(3):
        (root / f"{i}.png").write_bytes(image(40 * i))
    return {"texts": writer().save(root / "texts"), "captions": captioner().save(root / "captions"), "root": root}


def test_a_bundle_writes_what_its_model_did(folders: dict[str, Path]) -> None:
    here, there = writer(), TokenBundle.load(folders["texts"])
    assert (there.policy, there.draft, there.about) == (here.policy, here.draft, {"text": "a test"})
    prompts = ["a frog above", "and a ship", ""]
    said = there.write(prompts, max_new_tokens=12)
    assert said == here.write(prompts, max_new_tokens=12)
    assert len({k for each in said for k in each.exits}) > 1
    for each in said:
        assert "".join(each.pieces).replace("</s>", "").replace("<s>", "").split() == each.text.split()
    ids = [[2, 3, 4], [6, 2, 9], [0]]
    found = generate(here.model, here.policy, ids, max_new_tokens=12, end=1)
    assert [each.exits for each in said] == list(found.exits)


def test_a_bundle_writes_in_every_way(folders: dict[str, Path]) -> None:
    bundle = TokenBundle.load(folders["texts"])
    plain = bundle.write(["a frog"], max_new_tokens=10, policy=None)
    assert 10 < len(bundle.write(["a frog above"])[0].pieces) <= 61  # of 64 places, three are taken
    assert bundle.write(["a frog"], max_new_tokens=10, lossless=True)[0].text == plain[0].text
    assert len(bundle.write(["a frog"], max_new_tokens=10, beams=3)) == 1
    drawn = bundle.write(["a frog"], max_new_tokens=10, sampling=Sampling(temperature=3.0, seed=1))
    assert drawn != bundle.write(["a frog"], max_new_tokens=10, sampling=Sampling(temperature=3.0, seed=2))
    pieces: list[str] = []
    said = bundle.write(["a frog"], max_new_tokens=10, stream=lambda _, piece, __: pieces.append(piece))
    assert tuple(pieces) == said[0].pieces
    with pytest.raises(ValueRangeError, match="beams, sampling and lossless do not go together"):
        bundle.write(["a"], beams=2, lossless=True)
    with pytest.raises(ValueRangeError, match="stop strings and streams go with greedy"):
        bundle.write(["a"], beams=2, stop=["."])
    with pytest.raises(DataError, match="the bundle takes no images"):
        bundle.caption([image(0)])


def test_a_captioner_says_what_it_said_before(folders: dict[str, Path]) -> None:
    here, there = captioner(), TokenBundle.load(folders["captions"])
    images = [folders["root"] / f"{i}.png" for i in range(3)]
    assert there.caption(images, max_new_tokens=8) == here.caption(images, max_new_tokens=8)
    with pytest.raises(DataError, match=r"nothing.png does not exist"):
        there.caption([Path("nothing.png")])
    with pytest.raises(DataError, match="there is no image"):
        there.caption([])
    with pytest.raises(ValueRangeError, match="the bundle has no draft"):
        there.caption(images, lossless=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_bundle_keeps_its_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    here = writer()
    here.model.to(dtype)
    there = TokenBundle.load(here.save(tmp_path / "bundle"))
    assert {parameter.dtype for parameter in there.model.parameters()} == {dtype}
    assert there.write(["a frog", "and"], max_new_tokens=12) == here.write(["a frog", "and"], max_new_tokens=12)


def test_what_does_not_fit_a_model_is_no_bundle(tmp_path: Path) -> None:
    made = writer()
    with pytest.raises(ShapeError, match="9"):
        TokenBundle(made.model, made.tokenizer, TokenPolicy(MaxProb((0.5,) * 9)))
    with pytest.raises(ValueRangeError, match="the draft is of exit 9"):
        TokenBundle(made.model, made.tokenizer, draft=Draft(9))
    longer = tokenizer()
    longer.add_tokens(["zebra"])
    with pytest.raises(ValueRangeError, match="the tokenizer has 13 tokens; the model has 12"):
        TokenBundle(made.model, longer)
    with pytest.raises(ValueRangeError, match="about is not JSON"):
        TokenBundle(made.model, made.tokenizer, about={"tensor": torch.ones(1)}).save(tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    with pytest.raises(DataError, match="expected a list of paths"):
        captioner().caption("one.png")
    with pytest.raises(FormatError, match="Write one with TokenBundle.save"):
        TokenBundle.load(tmp_path / "nothing")


def test_a_tokenizer_begins_texts_as_it_likes() -> None:
    from tokenizers.processors import TemplateProcessing

    made, begun = writer(), tokenizer()
    begun.backend_tokenizer.post_processor = TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    bundle = TokenBundle(made.model, begun, made.policy)
    said = bundle.write(["a frog", ""], max_new_tokens=8)
    found = generate(made.model, made.policy, [[0, 2, 3], [0]], max_new_tokens=8, end=1)
    assert [each.exits for each in said] == list(found.exits)


def test_pieces_go_on_from_the_prompt() -> None:
    made = writer()
    pieces: list[str] = []
    (said,) = made.write(["a frog"], max_new_tokens=8, stream=lambda _, piece, __: pieces.append(piece))
    words = made.tokenizer.decode(
        [2, 3, *generate(made.model, made.policy, [[2, 3]], max_new_tokens=8, end=1).tokens[0]]
    )
    assert "a frog" + "".join(pieces) == words
    assert pieces[0].startswith(" ")
    assert tuple(pieces) == said.pieces


def test_each_batch_has_draws_of_its_own(folders: dict[str, Path]) -> None:
    given = ["generate", *["a frog"] * 6, "--bundle", str(folders["texts"]), "--temperature", "5", "--batch-size", "1",
             "--max-new-tokens", "12", "--json"]  # fmt: skip
    said = [each["text"] for each in json.loads(run.invoke(app, given).stdout)["texts"]]
    assert len(set(said)) > 1
    assert said == [each["text"] for each in json.loads(run.invoke(app, given).stdout)["texts"]]


def test_an_empty_standard_input_is_said(folders: dict[str, Path]) -> None:
    found = run.invoke(app, ["generate", "--bundle", str(folders["texts"])], input="\n\n")
    assert found.exit_code == 2
    assert "standard input has no text" in found.output
    found = run.invoke(app, ["generate", "--bundle", str(folders["texts"]), "--json"], input="a frog\n\nand\n")
    assert [each["given"] for each in json.loads(found.stdout)["texts"]] == ["a frog", "and"]


def test_damaged_and_foreign_bundles_say_so(folders: dict[str, Path], tmp_path: Path) -> None:
    from shutil import copytree

    broken = tmp_path / "broken"
    copytree(folders["texts"], broken)
    weights = next(broken.glob("weights*"))
    weights.write_bytes(weights.read_bytes()[:-9] + b"123456789")
    with pytest.raises(FormatError, match="is damaged: its checksum is not the manifest's"):
        TokenBundle.load(broken)
    with pytest.raises(FormatError, match="holds a model that generates: use `offramp generate`"):
        Bundle.load(folders["texts"])
    with pytest.raises(FormatError, match="does not exist"):
        TokenBundle.load(tmp_path / "none")
    torch.manual_seed(0)
    other = attach_tokens(transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2)))
    with pytest.raises(ValueRangeError, match="the tokenizer is str; expected a fast tokenizer"):
        TokenBundle(other, "words").save(tmp_path / "x")


def test_generate_and_caption_from_the_command_line(folders: dict[str, Path]) -> None:
    texts = str(folders["texts"])
    page = folders["root"] / "texts.html"
    found = run.invoke(app, ["generate", "a frog above", "a ship", "--bundle", texts, "--max-new-tokens", "9", "--json",
                             "--html", str(page)])  # fmt: skip
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    assert [each["given"] for each in told["texts"]] == ["a frog above", "a ship"]
    assert all(len(each["tokens"]) == len(each["exits"]) <= 9 for each in told["texts"])
    assert 'title="exit 1 of 3"' in page.read_text() or 'title="exit 2 of 3"' in page.read_text()
    marked = run.invoke(app, ["generate", "a frog", "--bundle", texts, "--exits", "--max-new-tokens", "5"])
    assert "[1]" in marked.stdout or "[2]" in marked.stdout
    piped = run.invoke(app, ["generate", "--bundle", texts, "--max-new-tokens", "3"], input="a frog\na ship\n")
    assert len(piped.stdout.splitlines()) == 2
    images = [str(folders["root"] / f"{i}.png") for i in range(3)]
    said = run.invoke(app, ["caption", *images, "--bundle", str(folders["captions"]), "--max-new-tokens", "6",
                            "--html", str(page)])  # fmt: skip
    assert said.exit_code == 0, said.output
    assert [line.split(": ")[0] for line in said.stdout.splitlines()] == images
    assert page.read_text().count("<img") == 3


def test_what_a_bundle_holds(folders: dict[str, Path]) -> None:
    told = json.loads(run.invoke(app, ["inspect", str(folders["texts"]), "--json"]).stdout)
    assert (told["takes"], told["layers"], told["exits behind layers"]) == ("texts", LAYERS, [1, 3, 4])
    assert (told["policy"], told["draft"]) == ("MaxProb", "3 tokens of exit 2")
    shown = run.invoke(app, ["inspect", str(folders["captions"])]).stdout
    assert "takes: images" in shown


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["caption", "{root}/not.png", "--bundle", "{captions}"], "not.png is no image that can be read"),
        (["generate", "a frog", "--bundle", "{root}"], "is no bundle"),
        (["generate", "a " * 80, "--bundle", "{texts}"], "the decoder has room for 64"),
        (["generate", "a", "--bundle", "{captions}"], "the bundle says what is on images: use `offramp caption`"),
        (["generate", "a", "--bundle", "{texts}", "--temperature", "0"], "temperature is 0.0; expected above 0"),
        (["predict", "{texts}", "a"], "holds a model that generates"),
    ],
)
def test_what_cannot_be_written_is_said(folders: dict[str, Path], words: list[str], told: str) -> None:
    (folders["root"] / "not.png").write_text("no image")
    names = {name: str(path) for name, path in folders.items()}
    found = run.invoke(app, [word.format(**names) for word in words])
    assert found.exit_code == 1, found.output
    assert told in found.stderr
