"""How good captions are: BLEU, METEOR, ROUGE-L, CIDEr, and what they lose when tokens leave early."""

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from offramp.errors import DataError, MissingExtra, ShapeError, ValueRangeError

__all__ = ["METRICS", "CaptionScores", "MetricDrop", "caption_scores"]

METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "SPICE")
USUAL = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr")
LARGEST = {"CIDEr": 10.0}  # of one caption; the others are at most 1


@dataclass(frozen=True)
class CaptionScores:
    """Scores of captions.

    Args:
        whole: of all captions together, by metric, as the field reports them, in parts of one (CIDEr up to 10).
        rows: of every caption [row] by metric. BLEU of all is not the mean of these.
    """

    whole: dict[str, float]
    rows: dict[str, Float[Tensor, "row"]]


def caption_scores(
    references: Sequence[Sequence[str]], captions: Sequence[str], *, metrics: Sequence[str] = USUAL,
    tokenizer: Literal["ptb", "plain"] = "plain",
) -> CaptionScores:  # fmt: skip
    """The usual scores of captions, by pycocoevalcap.

    Args:
        references: what people said of each image, one or more each.
        captions: what is to be scored, one for each image.
        metrics: of `METRICS`. METEOR and SPICE need Java, and SPICE its models, which pycocoevalcap's own
            `get_stanford_models` loads from the net.
        tokenizer: "ptb": the usual one, which needs Java; "plain": lower-case words without punctuation, the same on
            captions of plain words. CIDEr weighs n-grams by how rare they are in these references.

    Raises:
        MissingExtra: pycocoevalcap is not installed.
        DataError: Java is needed and not there, or an image has no reference.
        ValueRangeError, ShapeError: an unknown metric or tokenizer; as many captions as images are expected.
    """
    if unknown := set(metrics) - set(METRICS):
        raise ValueRangeError(f"unknown metrics {', '.join(sorted(unknown))}; expected some of {', '.join(METRICS)}.")
    if tokenizer not in ("ptb", "plain"):
        raise ValueRangeError(f"tokenizer is {tokenizer!r}; expected 'ptb' or 'plain'.")
    if len(references) != len(captions):
        raise ShapeError(f"there are {len(captions)} captions for {len(references)} images; expected one for each.")
    if not references or any(not each or isinstance(each, str) for each in references):
        raise DataError("every image needs a list of one or more references.")
    if not all(isinstance(text, str) for text in (*captions, *(text for each in references for text in each))):
        raise DataError("captions and references have something that is no text; expected strings.")
    if (tokenizer == "ptb" or {"METEOR", "SPICE"} & set(metrics)) and shutil.which("java") is None:
        raise DataError("METEOR, SPICE and the tokenizer 'ptb' need Java on the PATH; install it, or go without them.")
    try:
        import pycocoevalcap
    except ImportError:
        raise MissingExtra("scores of captions need pycocoevalcap: pip install 'offramp[captions]'.") from None
    if "SPICE" in metrics and not list((Path(pycocoevalcap.__path__[0]) / "spice" / "lib").glob("*-models.jar")):
        raise DataError(
            "SPICE needs models that are not here: with a net, run python -c 'from "
            "pycocoevalcap.spice.get_stanford_models import get_stanford_models as get; get()', or go without SPICE."
        )
    given = _tokenized(dict(enumerate(map(list, references))), tokenizer)
    said = _tokenized({i: [caption] for i, caption in enumerate(captions)}, tokenizer)
    if not any(text for each in given.values() for text in each):
        raise DataError("no reference has a word, so there is nothing to score by.")
    whole: dict[str, float] = {}
    rows: dict[str, Tensor] = {}
    for names, scorer in _scorers(metrics):
        total, each = scorer(given, said)
        totals, parts = (total, each) if len(names) > 1 else ([total], [each])
        for name, one, part in zip(names, totals, parts, strict=True):
            if name in metrics:
                whole[name], rows[name] = float(one), torch.tensor([float(x) for x in part])
    return CaptionScores(whole, rows)


def _scorers(metrics: Sequence[str]) -> list[tuple[tuple[str, ...], Callable[[Any, Any], Any]]]:
    found: list[tuple[tuple[str, ...], Callable[[Any, Any], Any]]] = []
    if any(name.startswith("BLEU") for name in metrics):
        from pycocoevalcap.bleu.bleu import Bleu

        found.append((METRICS[:4], lambda given, said: Bleu(4).compute_score(given, said, verbose=0)))
    if "METEOR" in metrics:
        from pycocoevalcap.meteor.meteor import Meteor

        found.append((("METEOR",), lambda given, said: Meteor().compute_score(given, said)))
    if "ROUGE-L" in metrics:
        from pycocoevalcap.rouge.rouge import Rouge

        found.append((("ROUGE-L",), lambda given, said: Rouge().compute_score(given, said)))
    if "SPICE" in metrics:
        from pycocoevalcap.spice.spice import Spice

        def spice(given: Any, said: Any) -> Any:
            total, each = Spice().compute_score(given, said)
            return total, [one["All"]["f"] for one in each]

        found.append((("SPICE",), spice))
    if "CIDEr" in metrics:
        from pycocoevalcap.cider.cider import Cider

        found.append((("CIDEr",), lambda given, said: Cider().compute_score(given, said)))
    return found


def _tokenized(captions: dict[int, list[str]], tokenizer: str) -> dict[int, list[str]]:
    if tokenizer == "plain":
        return {i: [" ".join(re.findall(r"[a-z0-9']+", one.lower())) for one in each] for i, each in captions.items()}
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    return PTBTokenizer().tokenize({i: [{"caption": one} for one in each] for i, each in captions.items()})  # type: ignore[no-any-return]


@dataclass(frozen=True)
class MetricDrop:
    """A loss for `certify_texts`: the mean score of captions that leave early is at least `1 - share` of the whole's.

    Each caption's loss is ((1 - share) whole - early) / the largest score, of which the mean is to be at most 0.

    Args:
        references: what people said of each image, in the order of the prompts.
        decode: from tokens to a caption.
        metric: "CIDEr", "ROUGE-L" or "METEOR".
        share: of the whole decoder's score that may be lost, e.g. 0.01.
    """

    references: Sequence[Sequence[str]]
    decode: Callable[[Sequence[int]], str]
    metric: str = "CIDEr"
    share: float = 0.01
    epsilon: float = field(default=0.0, init=False)
    least: float = field(default=-1.0, init=False)

    def __post_init__(self) -> None:
        if self.metric not in ("CIDEr", "ROUGE-L", "METEOR"):
            raise ValueRangeError(
                f"the metric is {self.metric!r}; expected CIDEr, ROUGE-L or METEOR, which are means over captions."
            )
        if not 0 < self.share < 1:
            raise ValueRangeError(f"share is {self.share!r}; expected a number between 0 and 1.")

    @property
    def name(self) -> str:
        """What is bounded."""
        return f"{100 * self.share:.4g} % of {self.metric} lost"

    def __call__(self, whole: Sequence[Sequence[int]], early: Sequence[Sequence[int]]) -> Tensor:
        """The losses [row], from -1 to 1."""
        a, b = (self._scores(tokens) for tokens in (whole, early))
        return (((1 - self.share) * a - b) / LARGEST.get(self.metric, 1.0)).clamp(-1, 1)

    def _scores(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        captions = [self.decode(each) for each in tokens]
        return caption_scores(self.references, captions, metrics=(self.metric,)).rows[self.metric]
