"""Commands that write texts: generate, behind prompts, and caption, of images."""

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli.options import DeviceOption, JsonOption, ThreadsOption, check_out, device_of, usage
from offramp.cli.show import is_quiet, note, result

if TYPE_CHECKING:
    from offramp.generation import Said, TokenBundle

__all__ = ["caption", "generate"]

PromptsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Texts; else lines of standard input.")
]
TemperatureOption = Annotated[
    float | None, typer.Option(help="Draw tokens, logits divided by this; the likeliest else.")
]
BundleOption = Annotated[Path, typer.Option("--bundle", help="Folder that TokenBundle.save wrote.")]
NewOption = Annotated[
    int | None, typer.Option("--max-new-tokens", min=1, help="At most so many for each text; 64, if there is room.")
]
BeamsOption = Annotated[int, typer.Option(min=1, help="A beam search of so many instead of the likeliest token.")]
PlainOption = Annotated[bool, typer.Option("--no-exits", help="Every token from the whole decoder.")]
LosslessOption = Annotated[
    bool, typer.Option("--lossless", help="The whole decoder's text, made of drafts of an early exit that are checked.")
]
ExitsOption = Annotated[bool, typer.Option("--exits", help="Show at which exit each token left.")]
HtmlOption = Annotated[Path | None, typer.Option(help="Write a page, each token coloured by its exit.")]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Texts at once.")]


def generate(
    prompts: PromptsArgument = None,
    *,
    bundle: BundleOption,
    max_new_tokens: NewOption = None,
    temperature: TemperatureOption = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many of the likeliest.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest that have this probability.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    beams: BeamsOption = 1,
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends a text; may be given again.")] = None,
    lossless: LosslessOption = False,
    no_exits: PlainOption = False,
    exits: ExitsOption = False,
    html: HtmlOption = None,
    batch_size: BatchOption = 8,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    json_out: JsonOption = False,
) -> None:
    """Write on behind prompts with a decoder whose tokens leave at exits; one prompt alone is written as it comes."""
    given = list(prompts) if prompts else _lines()
    opened = _opened(bundle, html, device, threads)
    from offramp.generation import Sampling

    drawn = None
    if temperature is not None or top_k is not None or top_p is not None:
        drawn = Sampling(temperature=1.0 if temperature is None else temperature, top_k=top_k, top_p=top_p, seed=seed)
    live = len(given) == 1 and beams == 1 and not lossless and not json_out and not exits and sys.stdout.isatty()

    end = opened.tokenizer.eos_token

    def speak(_: int, piece: str, __: int) -> None:
        print(piece.removesuffix(end) if end else piece, end="", flush=True)

    options: dict[str, Any] = {"sampling": drawn, "stop": tuple(stop or ()), "stream": speak if live else None}
    if live:
        print(given[0], end="", flush=True)
    said, seconds = _written(
        lambda part, **more: opened.write(part, **more), given, batch_size, no_exits,
        max_new_tokens=max_new_tokens, beams=beams, lossless=lossless, **options,
    )  # fmt: skip
    if live:
        print()
    _show(opened, said, given, seconds, exits=exits, json_out=json_out, silent=live)
    if html is not None:
        from offramp.report.texts import save_texts

        title = "Texts and where their tokens left"
        note(f"wrote {save_texts(html, said, opened.model.exits, title=title, prompts=given)}")


def caption(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    *,
    bundle: BundleOption,
    max_new_tokens: NewOption = None,
    beams: BeamsOption = 1,
    lossless: LosslessOption = False,
    no_exits: PlainOption = False,
    exits: ExitsOption = False,
    html: HtmlOption = None,
    batch_size: BatchOption = 8,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    json_out: JsonOption = False,
) -> None:
    """Say what is on images, with a decoder whose tokens leave at exits."""
    opened = _opened(bundle, html, device, threads)
    said, seconds = _written(
        lambda part, **more: opened.caption(part, **more), images, batch_size, no_exits,
        max_new_tokens=max_new_tokens, beams=beams, lossless=lossless,
    )  # fmt: skip
    _show(opened, said, [str(path) for path in images], seconds, exits=exits, json_out=json_out, named=True)
    if html is not None:
        from offramp.report.texts import save_texts

        pictures = [path.read_bytes() for path in images]
        title = "Captions and where their tokens left"
        note(f"wrote {save_texts(html, said, opened.model.exits, title=title, images=pictures)}")


def _lines() -> list[str]:
    if sys.stdin.isatty():
        raise usage("there is no PROMPT. Give one or more, or lines on standard input.")
    lines = [text for line in sys.stdin if (text := line.rstrip("\r\n")).strip()]
    if not lines:
        raise usage("standard input has no text. Give one or more prompts, a line each.")
    return lines


def _opened(bundle: Path, html: Path | None, device: str, threads: int | None) -> "TokenBundle":
    if html is not None:
        check_out(html)
    place = device_of(device)
    import torch

    from offramp.generation import TokenBundle

    if threads is not None:
        torch.set_num_threads(threads)
    opened = TokenBundle.load(bundle)
    opened.model.to(place)
    return opened


def _written(
    write: Any, given: Sequence[Any], batch_size: int, no_exits: bool, **options: Any
) -> tuple[list["Said"], float]:
    """(texts, seconds)."""
    if no_exits:
        options["policy"] = None
    said: list[Said] = []
    began = time.perf_counter()
    drawn = options.get("sampling")
    for begin in range(0, len(given), batch_size):
        if drawn is not None:  # each batch has draws of its own
            options["sampling"] = replace(drawn, seed=drawn.seed + begin)
        said += write(given[begin : begin + batch_size], **options)
    return said, time.perf_counter() - began


def _show(
    opened: "TokenBundle", said: Sequence["Said"], given: Sequence[str], seconds: float, *, exits: bool, json_out: bool,
    named: bool = False, silent: bool = False,
) -> None:  # fmt: skip
    tokens = sum(len(each.exits) for each in said)
    depth = sum(k + 1 for each in said for k in each.exits) / max(1, tokens)
    values = [
        {"given": what, "text": each.text, "tokens": list(each.pieces), "exits": [k + 1 for k in each.exits]}
        for what, each in zip(given, said, strict=True)
    ]
    lines: list[str] = []
    for what, each in zip(given, said, strict=True):
        marked = [f"{piece}[{k + 1}]" for piece, k in zip(each.pieces, each.exits, strict=True)]
        text = "".join(marked) if exits else each.text
        lines.append(f"{what}: {text}" if named else text)
    told = {"texts": values, "exits": opened.model.exits, "tokens": tokens, "mean_exit": depth, "seconds": seconds}
    if json_out or not silent:
        result(told, lines, json_out)
    if not is_quiet():
        note(f"{tokens} tokens, {tokens / seconds:.0f} a second, mean exit {depth:.1f} of {opened.model.exits}")
