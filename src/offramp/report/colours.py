"""One colour for each family in every figure; told apart by people who see colours otherwise (Okabe and Ito 2008)."""

from collections.abc import Iterable

__all__ = ["colour_of", "shades"]

FAMILIES = {
    "max-prob": "#0072B2",
    "entropy": "#56B4E9",
    "patience": "#8C8C8C",
    "beem-c": "#E69F00",
    "beem-a": "#D55E00",
    "eenet": "#009E73",
    "stopping": "#CC3366",
    "msdnet": "#6A51A3",
    "ztw": "#B8860B",
    "fixed": "#B0B0B0",
    "jei-dnn": "#7A5195",
}
OTHERS = ("#CC79A7", "#7A5195", "#B8860B")


def colour_of(family: str) -> str:
    """The colour of a family, always the same one."""
    return FAMILIES.get(family) or OTHERS[sum(map(ord, family)) % len(OTHERS)]


def shades(policies: Iterable[tuple[str, str]]) -> dict[str, str]:
    """A colour for each (name, family): the family's own for its first policy, lighter ones for those that follow."""
    found: dict[str, str] = {}
    seen: dict[str, int] = {}
    for name, family in policies:
        place = seen.get(family, 0)
        seen[family] = place + 1
        parts = [int(colour_of(family)[i : i + 2], 16) for i in (1, 3, 5)]
        light = min(0.6, 0.32 * place)
        found[name] = "#" + "".join(f"{round(part + (255 - part) * light):02x}" for part in parts)
    return found
