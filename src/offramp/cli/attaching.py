"""`offramp attach`: what exits would be put where, and whether the network can be cut there. Nothing is written."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli.options import JsonOption, image_size, names_in, usage
from offramp.cli.show import line, note, result, table

if TYPE_CHECKING:
    from offramp.model import MultiExitModel
    from offramp.stages import CarryItem

__all__ = ["attach", "shares_of"]


def attach(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_RUN",
            help="minilm, resnet20, resnet56, package.module:function, a transformers folder or hub name, or a run.",
        ),
    ],
    at: Annotated[str | None, typer.Option(help="Modules to put exits behind, with commas; found by default.")] = None,
    every: Annotated[int | None, typer.Option(min=1, help="An exit behind every n-th block of the network.")] = None,
    head: Annotated[
        str | None, typer.Option(help="auto, map, conv, first, mean, pooler or vector; as `offramp train` by default.")
    ] = None,
    classes: Annotated[int, typer.Option(min=2, help="How many classes.")] = 2,
    shape: Annotated[
        str | None,
        typer.Option(help="Of one row of a network of your own, e.g. 3x32x32 or 20 (float32)."),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="For a network of your own on texts: whose tokenizer.")] = None,
    image_size_: Annotated[str | None, typer.Option("--image-size", help="Of images: SIDE or HEIGHTxWIDTH.")] = None,
    json_out: JsonOption = False,
) -> None:
    """Show the stages, taps, heads, carry and FLOPs of a network with exits; a dry run that writes nothing."""
    built = _built(model, names_in(at), every, head, classes, shape, tokenizer, image_size_)
    value = _described(built)
    if json_out:
        result(value, (), True)
        return
    if value["stages"] is None:
        line(f"{model}: exits behind {', '.join(built.taps)}")
        note(f"warning: {value['why_not']}")
        return
    table(
        f"{model}: {built.exits} exits, {value['parameters'] / 1e6:.2f} million parameters, "
        f"{value['plain_flops'] / 1e6:.1f} million FLOPs a row",
        ("exit", "behind", "head", "operators", "parameters", "FLOPs", "cost so far", "carried on per row"),
        [
            (
                str(row["exit"]), row["tap"], row["head"], str(row["operators"]), f"{row['parameters']:,}",
                f"{row['flops'] / 1e6:.2f} M", f"{row['cost']:.3f}", _carried(row["carry"]),
            )
            for row in value["stages"]
        ],
    )  # fmt: skip
    line("cost so far is a part of the plain network's FLOPs, heads included; nothing was trained or written")
    if any("n1" in item["shape"] for row in value["stages"] for item in row["carry"]):
        line("n1 is the number of tokens; bytes are counted for the made-up rows that were tried")


def shares_of(model: "MultiExitModel") -> str:
    """The cost up to each exit as a part of the plain model's FLOPs, for a person; or why it cannot be told."""
    from offramp.errors import OfframpError
    from offramp.measure import measure

    try:
        return ", ".join(f"{cost:.2f}" for cost in measure(model, model.example, batch_sizes=()).cumulative())
    except OfframpError as error:
        return f"not known: {error}"


def _built(
    ref: str, at: tuple[str, ...] | None, every: int | None, head: str | None, classes: int, shape: str | None,
    tokenizer: str | None, size: str | None,
) -> "MultiExitModel":  # fmt: skip
    if (Path(ref) / "run.json").is_file():
        from offramp.runs import load_run

        if at is not None or every is not None:
            raise usage("a run has its exits already; --at and --every are for networks.")
        return load_run(ref)[1]
    from offramp.attach import attach as run
    from offramp.networks import check_network, example_of, load_network, load_tokenizer, preprocess_of, tokens_for
    from offramp.own import default_head
    from offramp.placement import place
    from offramp.preprocess import ImagePreprocess, TextPreprocess

    network = load_network(ref, tuple(map(str, range(classes))), untrained=True)
    for text in network.notes:
        note(f"note: {text}")
    sides = image_size(size)
    made: Any = preprocess_of(network, ("text",), max_length=128, image_size=sides, mode="RGB")
    if made is None and tokenizer is not None:
        made = TextPreprocess.of(load_tokenizer(tokenizer), ("text",), 128)
    if made is None and sides is not None:
        made = ImagePreprocess(sides)
    if made is not None:
        example = example_of(made)
    else:
        example = tokens_for(network.module) if network.kind == "text" else _rows(shape)
    kind = network.kind or ("text" if tokenizer is not None else None)
    check_network(network.module, example, hint="Say what it is fed: --shape, --image-size or --tokenizer.")
    taps = at or place(network.module, example, every=every)
    return run(network.module, at=taps, head=head or default_head(kind), example=example).eval()


def _rows(shape: str | None) -> Any:
    """Two rows of that shape."""
    import torch

    try:
        lengths = [int(part) for part in (shape or "").split("x")]
    except ValueError:
        lengths = []
    if not lengths or min(lengths) < 1:
        raise usage(f"--shape is {shape!r}; a network of your own needs the shape of one row, e.g. 3x32x32 or 20.")
    return torch.randn(2, *lengths, generator=torch.Generator().manual_seed(0))


def _described(model: "MultiExitModel") -> dict[str, Any]:
    from offramp.errors import OfframpError
    from offramp.measure import measure

    parameters = sum(parameter.numel() for parameter in model.parameters())
    value: dict[str, Any] = {"taps": model.taps, "exits": model.exits, "classes": model.classes}
    value |= {"parameters": parameters, "stages": None}
    try:
        stages = model.stages().describe()
        costs = measure(model, model.example, batch_sizes=())
    except OfframpError as error:
        return value | {"why_not": str(error)}
    rows = []
    for k, (info, cost) in enumerate(zip(stages, costs.cumulative(), strict=True)):
        last = k == len(stages) - 1
        rows.append(
            {
                "exit": k,
                "tap": "the model's own output" if last else info.tap,
                "head": "" if last else type(model.heads[k]).__name__.lstrip("_"),
                "operators": info.nodes,
                "parameters": info.parameters,
                "flops": costs.stage[k] * (costs.plain_flops or 0.0),
                "cost": cost,
                "carry": [_item(item, model.example) for item in info.carry],
            }
        )
    return value | {"plain_flops": costs.plain_flops or 0.0, "stages": rows}


def _item(item: "CarryItem", example: Any) -> dict[str, Any]:
    """One thing in a carry; `bytes` of one row, or of the whole where it has no rows, None where that depends."""
    import torch

    from offramp.inputs import tensors_of

    value = {"name": item.name, "kind": item.kind, "shape": list(item.shape), "dtype": item.dtype}
    if item.kind == "size":
        return value | {"bytes": 0}
    lengths = {"batch": 1, "n1": max(tensor.shape[-1] for tensor in tensors_of(example))}
    count: int | None = getattr(getattr(torch, item.dtype.removeprefix("torch."), None), "itemsize", None)
    for length in item.shape:
        known = int(length) if length.isdecimal() else lengths.get(length)
        count = None if count is None or known is None else count * known
    return value | {"bytes": count}


def _carried(items: list[dict[str, Any]]) -> str:
    """The carry in a cell of a table."""
    rows = [item for item in items if item["kind"] == "rows"]
    constants = [item for item in items if item["kind"] == "constant"]
    told = [f"{item['name']} [{', '.join(item['shape'][1:])}]" for item in rows]
    if rows and all(item["bytes"] is not None for item in rows):
        told.append(f"{sum(item['bytes'] for item in rows):,} bytes")
    if constants:
        told.append(f"{len(constants)} constant(s)")
    return "; ".join(told)
