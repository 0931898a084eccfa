"""Reading a preprocessing back from its folder."""

from pathlib import Path
from typing import Any

from offramp.artefacts import read_json
from offramp.errors import FormatError, OfframpError
from offramp.preprocess.base import FILE, KIND, VERSION, Preprocess
from offramp.preprocess.image import ImagePreprocess
from offramp.preprocess.numbers import NumberPreprocess
from offramp.preprocess.text import TOKENIZER, TextPreprocess

__all__ = ["load_preprocess"]

KINDS: dict[str, Any] = {
    "text": (TextPreprocess, {"columns", "max_length", "names", "pad_id"}),
    "image": (ImagePreprocess, {name for name in ImagePreprocess.__dataclass_fields__ if name != "kind"}),
    "numbers": (NumberPreprocess, {"columns", "mean", "std"}),
}
TUPLES = ("columns", "names", "mean", "std", "size")
LARGEST = 2**28  # bytes of a tokenizer


def load_preprocess(folder: str | Path) -> Preprocess:
    """The preprocessing in a folder that `save` wrote. Nothing of it is run as code.

    Raises:
        FormatError: a file is missing, damaged, foreign or from a newer version.
        MissingExtra: texts need the tokenizers package.
    """
    folder = Path(folder)
    path = folder / FILE
    value = read_json(path)
    if value.get("kind") != KIND:
        raise FormatError(f"{path} is of kind {str(value.get('kind'))[:80]!r}; expected {KIND!r}.")
    if value.get("version") != VERSION:
        raise FormatError(f"{path} has version {str(value.get('version'))[:20]}; this Offramp reads {VERSION}. Update.")
    of, fields = value.get("of"), value.get("fields")
    made, names = KINDS.get(of, (None, set())) if isinstance(of, str) else (None, set())
    if made is None or not isinstance(fields, dict) or set(fields) != names:
        raise FormatError(f"{path} is damaged: it is of {str(of)[:40]!r} with other fields than that has.")
    given = {name: tuple(what) if name in TUPLES and isinstance(what, list) else what for name, what in fields.items()}
    try:
        if of == "text":
            tokenizer = folder / TOKENIZER
            if not tokenizer.is_file() or tokenizer.stat().st_size > LARGEST:
                raise FormatError(f"{tokenizer} is missing or too large. Copy the whole folder again.")
            given["tokenizer_json"] = tokenizer.read_text(encoding="utf-8")
        return made(**given)
    except OfframpError as error:
        if isinstance(error, ImportError):
            raise
        raise FormatError(f"{path} is damaged: {error}") from None
    except Exception as error:  # what a constructor says to values of other kinds
        told = (str(error).splitlines() or ["no reason"])[0][:200]
        raise FormatError(f"{path} is damaged: {type(error).__name__}: {told}.") from None
