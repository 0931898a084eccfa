"""A page of generated texts, every token coloured by the exit it left at."""

import base64
import html
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from offramp.artefacts import write_atomically

__all__ = ["exit_colours", "save_texts"]

EARLY, LATE = (255, 221, 120), (24, 62, 140)


def exit_colours(exits: int) -> list[tuple[str, str]]:
    """(background, ink) of each exit: light ones leave early."""
    found = []
    for k in range(exits):
        share = k / max(1, exits - 1)
        red, green, blue = (round(a + (b - a) * share) for a, b in zip(EARLY, LATE, strict=True))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 140
        found.append((f"#{red:02x}{green:02x}{blue:02x}", "#ffffff" if dark else "#1c1d1f"))
    return found


def save_texts(
    path: str | Path, said: Sequence[Any], exits: int, *, title: str, prompts: Sequence[str] = (),
    images: Sequence[bytes] = (),
) -> Path:  # fmt: skip
    """The page, a single file that needs no net.

    Args:
        said: texts of a `TokenBundle`.
        exits: of the model, the last one included.
        title: above all.
        prompts, images: what they were written behind, for each text; PNG, JPEG or WebP.
    """
    colours = exit_colours(exits)
    cards = []
    for i, each in enumerate(said):
        picture = f'<img alt="" src="{_uri(images[i])}">' if images else ""
        prompt = f"<span class=given>{html.escape(prompts[i])}</span>" if prompts else ""
        tokens = "".join(
            f'<span style="background:{colours[k][0]};color:{colours[k][1]}" title="exit {k + 1} of {exits}">'
            f"{html.escape(piece)}</span>"
            for piece, k in zip(each.pieces, each.exits, strict=True)
        )
        depth = sum(k + 1 for k in each.exits) / max(1, len(each.exits))
        told = f"{len(each.exits)} tokens, mean exit {depth:.1f} of {exits}"
        cards.append(f"<article>{picture}<p>{prompt}{tokens}</p><small>{told}</small></article>")
    legend = "".join(
        f'<span style="background:{back};color:{ink}">{k + 1}</span>' for k, (back, ink) in enumerate(colours)
    )
    page = Template((files("offramp.report") / "texts.html").read_text(encoding="utf-8"))
    text = page.substitute(title=html.escape(title), legend=legend, cards="\n".join(cards))

    def write(partial: Path) -> None:
        partial.write_text(text, encoding="utf-8")

    return write_atomically(path, write)


def _uri(image: bytes) -> str:
    kinds = {b"\x89PNG": "png", b"\xff\xd8\xff\xe0": "jpeg", b"RIFF": "webp"}
    kind = kinds.get(image[:4], "jpeg")
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
