"""A folder with everything that generates: the network, its exits, tokenizer, images' preprocessing, and the policy."""

import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from offramp.artefacts import read_json
from offramp.bundle.store import read_manifest, write_store
from offramp.errors import DataError, FormatError, MissingExtra, ValueRangeError, first_line
from offramp.generation.choosing import Sampling, stop_at
from offramp.generation.encoders import KIND as RESNET
from offramp.generation.encoders import resnet_encoder
from offramp.generation.heads import TokenExits, attach_tokens
from offramp.generation.loop import Generated, generate
from offramp.generation.lossless import Draft, generate_lossless
from offramp.generation.rules import TokenPolicy, as_rule
from offramp.generation.searching import search
from offramp.graph import eval_mode
from offramp.preprocess import ImagePreprocess, load_preprocess

__all__ = ["Said", "TokenBundle"]

NETWORKS = (
    "GPT2LMHeadModel", "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
    "VisionEncoderDecoderModel",
)  # fmt: skip
BEFORE = 8  # tokens of a prompt that are read to tell a first piece's space
USUAL = 64  # new tokens of a text, where nobody says how many


@dataclass(frozen=True)
class Said:
    """One text.

    Args:
        text: without special tokens.
        pieces: the text of every new token, an end included.
        exits: the exit that each of them left at, 0-based.
    """

    text: str
    pieces: tuple[str, ...]
    exits: tuple[int, ...]


@dataclass(frozen=True)
class TokenBundle:
    """A model that generates, and what it takes to use it.

    Args:
        model: from `attach_tokens`.
        tokenizer: a fast tokenizer of transformers. Its begin and end tokens, where it has them, begin a caption and
            end a text.
        policy: how tokens leave; None where none should.
        preprocess: from images to what the encoder takes; for captions.
        draft: for lossless generation, where it pays.
        about: JSON values to keep with it: what was measured and promised.

    Raises:
        ShapeError, ValueRangeError: the policy, the draft or the tokenizer is for another model.
    """

    model: TokenExits
    tokenizer: Any
    policy: TokenPolicy | None = None
    preprocess: ImagePreprocess | None = None
    draft: Draft | None = None
    about: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        rule = as_rule(self.policy, self.model.exits, gates=self.model.gates is not None)
        object.__setattr__(self, "policy", rule)
        if self.draft is not None and self.draft.exit >= len(self.model.at):
            raise ValueRangeError(
                f"the draft is of exit {self.draft.exit}; expected one before the last, 0 to {len(self.model.at) - 1}."
            )
        if len(self.tokenizer) > self.model.classes:
            raise ValueRangeError(
                f"the tokenizer has {len(self.tokenizer)} tokens; the model has {self.model.classes}. Give its own."
            )

    def save(self, folder: str | Path) -> Path:
        """The folder, which holds the bundle afterwards; one that was there is replaced in one step.

        Raises:
            FormatError: the folder exists and is no bundle.
            ValueRangeError: the network or tokenizer is of no kind that can be written.
        """
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        network: Any = self.model.backbone
        if backend is None:
            raise ValueRangeError(f"the tokenizer is {type(self.tokenizer).__name__}; expected a fast tokenizer.")
        if type(network).__name__ not in NETWORKS:
            raise ValueRangeError(f"the network is {type(network).__name__}; expected one of {', '.join(NETWORKS)}.")
        fields = {
            "generates": True, "network": type(network).__name__, "exits": self.model.made,
            "gates": self.model.gates is not None, "policy": None if self.policy is None else self.policy.to_dict(),
            "draft": None if self.draft is None else [self.draft.exit, self.draft.tokens, self.draft.sure],
            "dtype": str(next(network.parameters()).dtype).removeprefix("torch."),
            "begin": self.tokenizer.bos_token, "end": self.tokenizer.eos_token, "about": self.about or {},
        }  # fmt: skip
        try:
            json.dumps(fields)
        except TypeError as error:
            raise ValueRangeError(
                f"about is not JSON: {first_line(error)}. Give texts, numbers, lists, dicts."
            ) from None
        config = json.dumps(network.config.to_dict(), default=str)
        files: dict[str, tuple[str, Callable[[Path], Any]]] = {
            "network": ("network.json", lambda path: path.write_text(config, encoding="utf-8")),
            "weights": ("weights.safetensors", lambda path: save_model(self.model, str(path))),
            "tokenizer": ("tokenizer.json", lambda path: path.write_text(backend.to_str(), encoding="utf-8")),
        }
        if self.preprocess is not None:
            images = self.preprocess

            def write(path: Path) -> None:
                with tempfile.TemporaryDirectory() as scratch:
                    images.save(Path(scratch))
                    path.write_bytes((Path(scratch) / "preprocess.json").read_bytes())

            files["preprocess"] = ("preprocess.json", write)
        return write_store(folder, files, fields)

    @classmethod
    def load(cls, folder: str | Path) -> "TokenBundle":
        """The bundle in a folder, checked against its checksums. Nothing of it is run as code.

        Raises:
            FormatError: it is no such bundle, or damaged.
            MissingExtra: transformers is not installed.
        """
        manifest = read_manifest(folder, made_by="TokenBundle.save")
        fields = manifest.fields
        if not fields.get("generates"):
            raise FormatError(f"{folder} is a bundle of a classifier; use `offramp predict`, or Bundle.load.")
        try:
            import transformers
        except ImportError:
            raise MissingExtra("generation needs transformers: pip install 'offramp[text]'.") from None
        config = read_json(manifest.path("network"))
        try:
            network = _network(fields["network"], config)
            exits = dict(fields["exits"])
            listed = exits.pop("shortlist", None)
            model = attach_tokens(
                network, tuple(exits.pop("at")), shortlist=None if listed is None else torch.tensor(listed), **exits
            )
            if fields["gates"]:
                model.gates = nn.ModuleList(nn.Linear(model.decoder.width, 1) for _ in model.at)
            model.to(_dtype(fields.get("dtype", "float32")))
            load_model(model, str(manifest.path("weights")), strict=True)
            tokenizer = transformers.PreTrainedTokenizerFast(
                tokenizer_file=str(manifest.path("tokenizer")), bos_token=fields["begin"], eos_token=fields["end"]
            )
            policy = None if fields["policy"] is None else TokenPolicy.from_dict(fields["policy"])
            draft = None if fields["draft"] is None else Draft(*fields["draft"])
            images = _preprocess(manifest.path("preprocess")) if "preprocess" in manifest.files else None
            return cls(model.eval(), tokenizer, policy, images, draft, dict(fields["about"]))
        except (FormatError, MissingExtra):
            raise
        except Exception as error:  # the tokenizers package raises bare ones
            what = f"it lacks {error}" if isinstance(error, KeyError) else first_line(error).rstrip(".")
            raise FormatError(f"{folder} is damaged: {what}. Copy it again.") from None

    def write(
        self, prompts: Sequence[str], *, max_new_tokens: int | None = None, policy: TokenPolicy | str | None = "own",
        sampling: Sampling | None = None, beams: int = 1, stop: Sequence[str] = (), lossless: bool = False,
        stream: Callable[[int, str, int], None] | None = None, encoded: Tensor | None = None,
    ) -> list[Said]:  # fmt: skip
        """What is written behind each prompt.

        Args:
            prompts: texts, with what the tokenizer itself puts before them; an empty one is begun with the begin
                token.
            max_new_tokens: at most so many; None: 64, or as many as the decoder has room for behind the longest prompt.
            policy: "own" is the bundle's; None leaves nowhere.
            sampling, beams: drawn tokens, or a beam search of so many.
            stop: strings that end a text, which keeps them.
            lossless: drafts that are checked, by the bundle's draft: the whole decoder's text.
            stream: told the row, the text of every new token, and its exit.
            encoded: what an encoder gave, for captions.

        Raises:
            DataError: a prompt is empty and there is no begin token; the bundle is for images.
            ValueRangeError: options that do not go together, or a prompt too long for the decoder.
        """
        if self.preprocess is not None and encoded is None:
            raise DataError("the bundle says what is on images: use `offramp caption`, or TokenBundle.caption.")
        rule = self.policy if isinstance(policy, str) else policy
        given = [self._ids(prompt) for prompt in prompts]
        end = self.tokenizer.eos_token_id
        if max_new_tokens is None:
            max_new_tokens = max(1, min(USUAL, self.model.decoder.context - max(map(len, given), default=0)))
        common: dict[str, Any] = {"max_new_tokens": max_new_tokens, "end": end, "encoded": encoded}
        if (beams > 1) + (sampling is not None) + lossless > 1:
            raise ValueRangeError("beams, sampling and lossless do not go together; choose one.")
        if (beams > 1 or lossless) and (stop or stream is not None):
            raise ValueRangeError(
                "stop strings and streams go with greedy or drawn tokens, not with beams, not with lossless."
            )
        if beams > 1:
            found = search(self.model, rule, given, beams=beams, **common)
        elif lossless:
            if self.draft is None:
                raise ValueRangeError("the bundle has no draft: none paid where it was made, or none was tried.")
            tokens = generate_lossless(self.model, self.draft, given, **common).tokens
            found = Generated(tokens, tuple((self.model.exits - 1,) * len(row) for row in tokens))
        else:
            speak = None if stream is None else _Speaker(self.tokenizer, stream, given)
            found = generate(
                self.model, rule, given, choose=sampling, stream=speak,
                stop=stop_at(self.tokenizer, stop) if stop else None, **common,
            )  # fmt: skip
        return [self._said(*row) for row in zip(given, found.tokens, found.exits, strict=True)]

    def caption(self, images: Iterable[Any], **options: Any) -> list[Said]:
        """A caption of each image.

        Args:
            images: paths, or the bytes of image files.
            options: as for `write`.

        Raises:
            DataError: an image cannot be read, or there is none; the bundle takes no images.
        """
        if self.preprocess is None:
            raise DataError("the bundle takes no images; it writes behind texts: use `offramp generate`.")
        if isinstance(images, str | bytes | Path):
            raise DataError(f"images is {str(images)[:60]!r}; expected a list of paths or of the bytes of image files.")
        rows = [{self.preprocess.column: image} for image in images]
        if not rows:
            raise DataError("there is no image. Give one or more.")
        device = next(self.model.parameters()).device
        pixels = self.preprocess.batch(rows)
        pixels = pixels if isinstance(pixels, Tensor) else next(iter(pixels.values()))
        with eval_mode(self.model), torch.inference_mode():
            encoded = self.model.encode(pixels.to(device))
        return self.write([""] * len(rows), encoded=encoded, **options)

    def _ids(self, prompt: str) -> list[int]:
        ids: list[int] = self.tokenizer(prompt)["input_ids"]
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if ids and ids[-1] == end and end != begin:  # the text goes on
            ids = ids[:-1]
        if not ids and begin is None:
            raise DataError("the prompt is empty, and the tokenizer has no token to begin with. Give some text.")
        return ids or [begin]

    def _said(self, given: Sequence[int], tokens: Sequence[int], exits: Sequence[int]) -> Said:
        pieces = list[str]()
        speaker = _Speaker(self.tokenizer, lambda _, piece, __: pieces.append(piece), [given])
        for token, exit_ in zip(tokens, exits, strict=True):
            speaker(0, token, exit_)
        return Said(self.tokenizer.decode(tokens, skip_special_tokens=True).strip(), tuple(pieces), tuple(exits))


class _Speaker:
    """Tells what each token adds to its row's text, which is not what it is alone: spaces, and parts of letters."""

    def __init__(
        self, tokenizer: Any, tell: Callable[[int, str, int], None], given: Sequence[Sequence[int]] = ()
    ) -> None:
        self.tokenizer, self.tell = tokenizer, tell
        special = set(tokenizer.all_special_ids)
        # a first word has no space before it, unless something is said before
        self.tokens = {row: [i for i in ids if i not in special][-BEFORE:] for row, ids in enumerate(given)}
        self.told = {row: tokenizer.decode(ids) for row, ids in self.tokens.items() if ids}

    def __call__(self, row: int, token: int, exit_: int) -> None:
        tokens = self.tokens.setdefault(row, [])
        tokens.append(token)
        text, before = self.tokenizer.decode(tokens), self.told.get(row, "")
        if text.endswith("\ufffd") or not text.startswith(before):  # a letter that is not whole yet
            self.tell(row, "", exit_)
            return
        self.told[row] = text
        self.tell(row, text[len(before) :], exit_)


def _dtype(name: Any) -> torch.dtype:
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"the dtype {name!r} is none of weights")
    return found


def _network(name: Any, config: dict[str, Any]) -> Any:
    """A network with random weights."""
    import transformers

    if name not in NETWORKS:
        raise ValueError(f"the network {name!r} is none of {', '.join(NETWORKS)}")
    if config.get("encoder", {}).get("model_type") == RESNET:
        resnet_encoder()
    made = getattr(transformers, name)
    return made(made.config_class.from_dict(config))


def _preprocess(path: Path) -> ImagePreprocess:
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "preprocess.json").write_bytes(path.read_bytes())
        found = load_preprocess(scratch)
    if not isinstance(found, ImagePreprocess):
        raise FormatError(f"{path} is for {found.kind}; expected images. Copy the bundle again.")
    return found
