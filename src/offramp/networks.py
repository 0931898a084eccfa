"""A network from what a user names: a function of theirs, a transformers folder or hub name, or one of ours."""

import contextlib
import dataclasses
import importlib
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offramp.demo import resnet20, resnet56
from offramp.errors import DataError, FormatError, MissingExtra, OfframpError, ValueRangeError
from offramp.graph import eval_mode
from offramp.inputs import Inputs, names_of, tensors_of
from offramp.preprocess import ImagePreprocess, NumberPreprocess, Preprocess, TextPreprocess
from offramp.tasks import minilm_folder, quiet

__all__ = [
    "OURS", "Network", "check_network", "example_of", "labels_of", "load_network", "load_tokenizer", "preprocess_of",
    "rebuild_network", "tokens_for",
]  # fmt: skip

#: Networks that need nothing from the user.
OURS = ("minilm", "resnet20", "resnet56")
CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"


@dataclass(frozen=True, eq=False)
class Network:
    """A network and what is known of how it is fed.

    Args:
        module: gives logits [batch cls].
        kind: "text" or "image" for one of transformers and ours; None for a user's own.
        tokenizer: of transformers, or None.
        processor: the values of a `preprocessor_config.json`, or None.
        notes: for a person, e.g. that the classifier is new.
    """

    module: nn.Module
    kind: str | None = None
    tokenizer: Any = None
    processor: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


def load_network(
    ref: str, classes: Sequence[str], *, channels: int = 3, seed: int = 0, untrained: bool = False
) -> Network:
    """The network that a reference names, for these classes. A function that it names is run; nothing else is.

    Args:
        ref: "minilm", "resnet20" or "resnet56"; "package.module:function", which is called with `classes=` if it takes
            that, and returns an `nn.Module`; or a folder or hub name of transformers.
        classes: their names.
        channels: of images, for our own networks.
        seed: of weights that are new.
        untrained: whether a transformers folder without weights will do, which then has random ones.

    Raises:
        ValueRangeError, DataError: the reference names nothing that can be used.
        MissingExtra: transformers is not installed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if ref in ("resnet20", "resnet56"):
            made = resnet20 if ref == "resnet20" else resnet56
            return Network(made(classes=len(classes), ch_in=channels, seed=seed), "image")
        if ref == "minilm":
            return _transformer(str(minilm_folder()), classes, "minilm", untrained)
        if ":" in ref and not Path(ref).exists():
            return Network(_called(ref, len(classes)))
        return _transformer(ref, classes, ref, untrained)


def rebuild_network(folder: Path, ref: str, classes: Sequence[str], *, channels: int = 3, seed: int = 0) -> nn.Module:
    """The network of a run, with new weights: from the configuration that the run keeps, or by its reference.

    Raises:
        FormatError: the configuration cannot be read, or the function that made the network cannot be run again.
    """
    if not (folder / CONFIG).is_file():
        try:
            return load_network(ref, classes, channels=channels, seed=seed).module
        except (ValueRangeError, DataError) as error:
            raise FormatError(
                f"the run was trained with --model {ref}, which is needed to make its network again: {error}"
            ) from None
    transformers = _transformers()
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
            return _kinds(transformers, config)[1].from_config(config, trust_remote_code=False, dtype=torch.float32)
    except OfframpError:
        raise
    except Exception as error:  # transformers raises many kinds
        raise FormatError(f"{folder / CONFIG} makes no network: {_line(error)}.") from None


def example_of(preprocess: Preprocess) -> Inputs:
    """Two rows as the network takes them, made up."""
    if isinstance(preprocess, ImagePreprocess):
        pixels = torch.zeros(2, len(preprocess.mean), *preprocess.size, dtype=torch.uint8)
        pixels[1] = 255
        return preprocess.normalise(pixels)
    if isinstance(preprocess, NumberPreprocess):
        return torch.tensor([[0.0], [1.0]]).expand(2, len(preprocess.columns)).contiguous()
    texts = ("a first sentence", "and another one")
    return preprocess.batch([dict.fromkeys(preprocess.columns, text) for text in texts])


def tokens_for(module: nn.Module) -> dict[str, torch.Tensor]:
    """Two rows of eight tokens, made up, for a network whose tokenizer is not there."""
    most = int(getattr(getattr(module, "config", None), "vocab_size", 0) or 100)
    ids = torch.arange(5, 21).reshape(2, 8) % most
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {name: tensor for name, tensor in made.items() if name in _keywords(module)}


def _called(ref: str, classes: int) -> nn.Module:
    """What a user's function returns."""
    path, _, attribute = ref.rpartition(":")
    name = path.removesuffix(".py").strip("./").replace("/", ".")
    # what is printed there is no result of ours
    with _here_first(), contextlib.redirect_stdout(sys.stderr):
        try:
            module = importlib.import_module(name)
        except (Exception, SystemExit) as error:
            if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
                raise ValueRangeError(
                    f"there is no module {name!r} for --model {ref!r}, looked for in {Path.cwd()} and among installed "
                    "packages. Run from the folder it is in, or set PYTHONPATH."
                ) from None
            raise ValueRangeError(f"the module {name!r} fails when it is imported: {_place(error)}.") from None
        function = getattr(module, attribute, None)
        if not callable(function):
            raise ValueRangeError(f"{name!r} has no function {attribute!r}; expected package.module:function.")
        try:
            made = function(classes=classes) if _takes(function, "classes") else function()
        except (Exception, SystemExit) as error:
            raise ValueRangeError(f"{ref} fails: {_place(error)}.") from None
    if not isinstance(made, nn.Module):
        raise ValueRangeError(f"{ref} returns {type(made).__name__}; expected a torch nn.Module.")
    return made


def _takes(function: Any, name: str) -> bool:
    import inspect

    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


@contextlib.contextmanager
def _here_first() -> Iterator[None]:
    """The block imports from the current folder too, as `python -m` does."""
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        yield
    finally:
        if added and here in sys.path:
            sys.path.remove(here)


def check_network(module: nn.Module, example: Inputs, *, hint: str) -> None:
    """Nothing, when the network takes the example.

    Raises:
        DataError: it does not; the message ends with the hint.
    """
    try:
        with eval_mode(module), torch.no_grad(), contextlib.redirect_stdout(sys.stderr):
            module(example) if isinstance(example, torch.Tensor) else module(**example)
    except Exception as error:  # the user's code and torch raise many kinds
        given = zip(names_of(example), tensors_of(example), strict=True)
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in given)
        raise DataError(f"the network fails on {shapes}: {_place(error)}. {hint}") from None


def _place(error: BaseException) -> str:
    """An error of the user's code, with the last line of theirs on the way to it."""
    ours = str(Path(__file__).parent)
    passed = traceback.extract_tb(error.__traceback__)
    outside = [f for f in passed if f.filename.endswith(".py") and not f.filename.startswith(ours)]
    theirs = [f for f in outside if "site-packages" not in f.filename and "importlib" not in f.filename]
    frames = theirs or outside
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{_line(error)}{where}"


def _line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    return f"{type(error).__name__}: {text[:240]}".rstrip(".")


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingExtra("models of transformers need: pip install 'offramp[text]'.") from None
    return transformers


def _kinds(transformers: Any, config: Any) -> tuple[str, Any]:
    """("text" or "image", the class that makes such a model)."""
    models = transformers.models.auto.modeling_auto
    if type(config) in models.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return "text", transformers.AutoModelForSequenceClassification
    if type(config) in models.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        return "image", transformers.AutoModelForImageClassification
    raise ValueRangeError(
        f"a {config.model_type} model classifies neither texts nor images in transformers; expected one that does. "
        "Give your own network as package.module:function."
    )


def labels_of(ref: str) -> tuple[str, ...] | None:
    """The names of the classes that a transformers folder or hub name was trained for; None when it does not say.

    Raises:
        DataError: there is no such folder or name.
        MissingExtra: transformers is not installed.
    """
    if ref in OURS or (":" in ref and not Path(ref).exists()):
        return None
    _check_ref(ref)
    try:
        with quiet():
            config = _transformers().AutoConfig.from_pretrained(ref, trust_remote_code=False)
        names = tuple(str(config.id2label[k]) for k in sorted(config.id2label))
    except OfframpError:
        raise
    except Exception as error:  # the hub, damaged files and old formats raise many kinds
        raise DataError(f"--model {ref!r} cannot be loaded: {_line(error)}.") from None
    return None if all(name == f"LABEL_{k}" for k, name in enumerate(names)) else names


def _check_ref(ref: str) -> None:
    """Nothing, when this may be a folder of transformers or a name of the hub."""
    folder = Path(ref)
    if folder.exists() and not (folder / CONFIG).is_file():
        raise DataError(f"{folder} is no transformers folder: it has no {CONFIG}. Give what save_pretrained wrote.")
    if not folder.exists() and (ref.startswith((".", "/")) or ref.count("/") > 1 or "/" not in ref):
        raise DataError(
            f"--model {ref!r} is no folder here; expected {', '.join(OURS)}, package.module:function, a folder that "
            "save_pretrained wrote, or owner/name on the hub."
        )


def _transformer(ref: str, classes: Sequence[str], name: str, untrained: bool) -> Network:
    _check_ref(ref)
    transformers, folder = _transformers(), Path(ref)
    labels = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    with quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(ref, trust_remote_code=False, **labels)
            config.num_labels = len(classes)
            config.problem_type = "single_label_classification"
            kind, maker = _kinds(transformers, config)
            notes = []
            if folder.exists() and not _has_weights(folder):
                if not untrained:
                    raise DataError(f"{name} has no weights beside its {CONFIG}. Copy model.safetensors there, too.")
                module = maker.from_config(config, trust_remote_code=False, dtype=torch.float32)
                notes.append(f"{name} has no weights beside its {CONFIG}; random ones are taken")
            else:
                module, missing = _pretrained(maker, ref, config)
                if missing:
                    notes.append(f"new weights, to be trained: {', '.join(missing[:4])}{' ...' if missing[4:] else ''}")
        except OfframpError:
            raise
        except Exception as error:  # the hub, damaged files and old formats raise many kinds
            if type(error).__name__ == "UnpicklingError":
                raise DataError(
                    f"the pytorch_model.bin of --model {ref!r} holds more than weights, or is damaged; nothing in it "
                    "is run. Give a folder with model.safetensors."
                ) from None
            raise DataError(f"--model {ref!r} cannot be loaded: {_line(error)}.") from None
    tokenizer = load_tokenizer(ref, "--model") if kind == "text" and not (untrained and _no_tokenizer(folder)) else None
    return Network(module, kind, tokenizer, _processor(ref) if kind == "image" else None, tuple(notes))


def load_tokenizer(ref: str, option: str = "--tokenizer") -> Any:
    """The tokenizer of a transformers folder or hub name.

    Args:
        option: what a message calls it.

    Raises:
        DataError: there is none.
    """
    if _no_tokenizer(Path(ref)):
        raise DataError(
            f"{option} {ref} has no tokenizer: no tokenizer.json and no vocabulary. Save it there with "
            "tokenizer.save_pretrained."
        )
    try:
        with quiet():
            return _transformers().AutoTokenizer.from_pretrained(ref, trust_remote_code=False)
    except OfframpError:
        raise
    except Exception as error:  # the hub and damaged files raise many kinds
        raise DataError(f"the tokenizer of {option} {ref!r} cannot be loaded: {_line(error)}.") from None


def _no_tokenizer(folder: Path) -> bool:
    return folder.is_dir() and not any(p for w in ("tokenizer*", "vocab*", "*.model") for p in folder.glob(w))


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))


def _pretrained(maker: Any, ref: str, config: Any) -> tuple[nn.Module, list[str]]:
    """(the model, the names of weights that were not in its files)."""
    module, told = maker.from_pretrained(
        ref, config=config, ignore_mismatched_sizes=True, output_loading_info=True, trust_remote_code=False,
        dtype=torch.float32,
    )  # fmt: skip
    mismatched = [str(item[0] if isinstance(item, tuple | list) else item) for item in told.get("mismatched_keys", ())]
    missing = sorted({*map(str, told.get("missing_keys", ())), *mismatched})
    count = len(module.state_dict())
    if 2 * len(missing) > count:
        raise DataError(
            f"the weights in {ref} are another network's: {len(missing)} of {count} that its {CONFIG} asks for are not "
            "there. Save the model again with save_pretrained."
        )
    return module, missing


def _processor(ref: str) -> dict[str, Any] | None:
    """The image processor's values, without its code."""
    from offramp.artefacts import read_json

    path = Path(ref) / PROCESSOR
    if Path(ref).exists():
        return read_json(path) if path.is_file() else None
    from transformers.utils import cached_file

    found = cached_file(ref, PROCESSOR, _raise_exceptions_for_missing_entries=False)
    return None if found is None else read_json(found)


def preprocess_of(
    network: Network, columns: Sequence[str], *, max_length: int, image_size: tuple[int, int] | None, mode: str
) -> TextPreprocess | ImagePreprocess | None:
    """The preprocessing that a network of transformers or ours comes with, or None for a user's own."""
    if network.tokenizer is not None:
        wanted = _keywords(network.module)
        names = [name for name in network.tokenizer.model_input_names if name in wanted]
        return TextPreprocess.of(network.tokenizer, columns, max_length, names)
    if network.kind != "image":
        return None
    name = "pixel_values" if hasattr(network.module, "config") else None
    if getattr(getattr(network.module, "config", None), "num_channels", 3) == 1:
        mode = "L"
    if network.processor is not None and image_size is None:
        made = ImagePreprocess.of(network.processor, column=columns[0], name=name)
        return dataclasses.replace(made, mode="L", mean=made.mean[:1], std=made.std[:1]) if mode == "L" else made
    side = getattr(getattr(network.module, "config", None), "image_size", 32)
    sides = tuple(side) if isinstance(side, list | tuple) else (int(side), int(side))
    return ImagePreprocess(image_size or (sides[0], sides[1]), mode=mode, column=columns[0], name=name)


def _keywords(module: nn.Module) -> set[str]:
    import inspect

    return set(inspect.signature(module.forward).parameters)
