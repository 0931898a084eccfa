"""Networks from what a user names, and what is said when the name is wrong or the code behind it fails."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from offramp.errors import DataError, FormatError, ValueRangeError
from offramp.networks import (
    check_network,
    example_of,
    labels_of,
    load_network,
    load_tokenizer,
    preprocess_of,
    rebuild_network,
)
from offramp.preprocess import ImagePreprocess, TextPreprocess
from own_material import MODULE, bert, vit

TWO = ("bad", "good")


class _Evil:
    """What runs code when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("networks")
    bert(folder / "bert")
    bert(folder / "named", labels=("POSITIVE", "NEGATIVE"))
    bert(folder / "distil", kind="distil")
    vit(folder / "vit")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the user's modules, which is the current one."""
    import sys

    (tmp_path / "ofr_mynet.py").write_text(MODULE)
    (tmp_path / "ofr_broken.py").write_text("x = 1\ny = x +\n")
    (tmp_path / "ofr_lacks.py").write_text("\nimport ofr_no_such_package\n")
    monkeypatch.chdir(tmp_path)
    for name in ("ofr_mynet", "ofr_broken", "ofr_lacks"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_a_function_with_and_without_classes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = load_network("ofr_mynet:mlp", ("a", "b", "c"))
    assert network.module(torch.zeros(1, 3)).shape == (1, 3)
    assert network.kind is None
    assert load_network("ofr_mynet:conv", TWO).module(torch.zeros(1, 3, 8, 8)).shape == (1, 2)
    assert load_network("ofr_mynet:Words", ("a", "b", "c")).module.out.out_features == 3  # a class will do
    assert load_network("ofr_mynet.py:conv", TWO).module is not None  # as one would write a file
    assert capsys.readouterr().out == ""  # what the module prints is no result


def test_new_weights_depend_on_the_seed_alone(here: Path) -> None:
    def first(seed: int) -> torch.Tensor:
        torch.rand(3)
        return load_network("ofr_mynet:mlp", TWO, seed=seed).module[0].weight

    state = torch.random.get_rng_state()
    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))
    torch.random.set_rng_state(state)
    load_network("resnet20", TWO)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("ref", "told"),
    [
        ("ofr_absent:mlp", r"no module 'ofr_absent'.*Run from the folder"),
        ("ofr_mynet:mpl", r"'ofr_mynet' has no function 'mpl'"),
        ("ofr_mynet:number", r"returns int; expected a torch nn.Module"),
        ("ofr_mynet:fails", r"fails: KeyError: 'weights.pt' at .*ofr_mynet.py:\d+"),
        ("ofr_mynet:leaves", r"fails: SystemExit: 4"),
        ("ofr_broken:net", r"fails when it is imported: SyntaxError"),
        ("ofr_lacks:net", r"fails when it is imported: .*ofr_no_such_package.* at .*ofr_lacks.py:2"),
    ],
)
def test_mistakes_in_a_users_code(here: Path, ref: str, told: str) -> None:
    with pytest.raises(ValueRangeError, match=told):
        load_network(ref, TWO)


def test_texts(folders: Path) -> None:
    for name, names in (("bert", ("input_ids", "attention_mask", "token_type_ids")),
                        ("distil", ("input_ids", "attention_mask"))):  # fmt: skip
        network = load_network(str(folders / name), TWO)
        assert network.kind == "text"
        made = preprocess_of(network, ("review",), max_length=16, image_size=None, mode="RGB")
        assert isinstance(made, TextPreprocess)
        assert made.names == tuple(n for n in names if n in network.tokenizer.model_input_names)
        said = network.module(**made.batch([{"review": "a great film"}]))
        assert said.logits.shape == (1, 2)
        assert network.module.config.id2label == {0: "bad", 1: "good"}
        assert network.module.dtype == torch.float32


def test_a_classifier_for_other_classes_is_new_and_said_to_be(folders: Path) -> None:
    assert load_network(str(folders / "bert"), TWO).notes == ()
    (note,) = load_network(str(folders / "bert"), ("a", "b", "c")).notes
    assert "new weights" in note
    assert "classifier.weight" in note


def test_labels_that_a_folder_knows(folders: Path) -> None:
    assert labels_of(str(folders / "named")) == ("POSITIVE", "NEGATIVE")
    assert labels_of(str(folders / "bert")) is None
    assert labels_of("resnet20") is None
    with pytest.raises(DataError, match="is no folder here; expected minilm"):
        labels_of("no_such_folder")


def test_images(folders: Path) -> None:
    network = load_network(str(folders / "vit"), TWO)
    made = preprocess_of(network, ("image",), max_length=1, image_size=None, mode="RGB")
    assert isinstance(made, ImagePreprocess)
    assert made.size == (16, 16)
    assert network.kind == "image"
    one = network.module.config.to_dict() | {"num_channels": 1}
    grey = folders / "grey"
    grey.mkdir(exist_ok=True)
    (grey / "config.json").write_text(json.dumps(one))
    shutil.copy(folders / "vit" / "preprocessor_config.json", grey)
    network = load_network(str(grey), TWO, untrained=True)
    made = preprocess_of(network, ("image",), max_length=1, image_size=None, mode="RGB")
    assert isinstance(made, ImagePreprocess)
    check_network(network.module, example_of(made), hint="")
    small = load_network("resnet20", TWO, channels=1)
    assert small.module.conv1.in_channels == 1


def test_folders_that_lack_something(folders: Path, tmp_path: Path) -> None:
    def copied(*left_out: str) -> str:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(folders / "bert", tmp_path / "copy", ignore=shutil.ignore_patterns(*left_out))
        return str(tmp_path / "copy")

    with pytest.raises(DataError, match=r"has no config.json"):
        load_network(copied("config.json"), TWO)
    with pytest.raises(DataError, match=r"no weights beside its config.json"):
        load_network(copied("model.safetensors"), TWO)
    with pytest.raises(DataError, match=r"has no tokenizer: no tokenizer.json"):
        load_network(copied("tokenizer*"), TWO)
    untrained = load_network(copied("model.safetensors", "tokenizer*"), TWO, untrained=True)
    assert untrained.tokenizer is None
    assert "random" in untrained.notes[0]
    damaged = Path(copied()) / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-50])
    with pytest.raises(DataError, match="cannot be loaded"):
        load_network(str(tmp_path / "copy"), TWO)
    mark = tmp_path / "mark"
    torch.save({"weight": _Evil(str(mark))}, Path(copied("model.safetensors")) / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"pytorch_model.bin .* holds more than weights"):
        load_network(str(tmp_path / "copy"), TWO)
    assert not mark.exists()
    (Path(copied()) / "config.json").write_text("{not json")
    with pytest.raises(DataError, match="cannot be loaded"):
        load_network(str(tmp_path / "copy"), TWO)
    (tmp_path / "copy" / "config.json").write_text(json.dumps({"model_type": "clap"}))
    with pytest.raises(ValueRangeError, match="a clap model classifies neither texts nor images"):
        load_network(str(tmp_path / "copy"), TWO)
    small = {"model_type": "distilbert", "vocab_size": 24, "dim": 8, "n_heads": 2, "hidden_dim": 8, "n_layers": 1}
    (tmp_path / "copy" / "config.json").write_text(json.dumps(small))
    with pytest.raises(DataError, match=r"another network's: .* of .* are not there"):
        load_network(str(tmp_path / "copy"), TWO)
    with pytest.raises(DataError, match=r"--tokenizer .* has no tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_configuration_never_brings_code(folders: Path, tmp_path: Path) -> None:
    """A run's network folder names code beside it; that code must not run, and nobody be asked whether it may."""
    mark = tmp_path / "mark"
    (tmp_path / "modeling_evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((folders / "bert" / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "modeling_evil.Evil", "AutoModelForSequenceClassification": "modeling_evil.Evil",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert type(rebuild_network(tmp_path, "x", TWO)).__name__ == "BertForSequenceClassification"
    config["model_type"] = "evil"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError):
        rebuild_network(tmp_path, "x", TWO)
    assert not mark.exists()


def test_a_run_needs_its_function_again(tmp_path: Path) -> None:
    with pytest.raises(
        FormatError, match=r"trained with --model ofr_gone:net, which is needed .* no module 'ofr_gone'"
    ):
        rebuild_network(tmp_path, "ofr_gone:net", TWO)


def test_inputs_that_do_not_fit_are_told_with_their_shape(here: Path) -> None:
    module = load_network("ofr_mynet:mlp", TWO).module
    with pytest.raises(DataError, match=r"fails on input \[2, 4\]: RuntimeError: .*Give another shape."):
        check_network(module, torch.zeros(2, 4), hint="Give another shape.")
