"""Weights of products in bf16, cast once, for stages that run under autocast."""

from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from offramp.cut import Piece
from offramp.stages import Parts

__all__ = ["lowered"]

#: Operators that autocast runs in bf16, and where their weights stand among the arguments.
PRODUCTS = {
    torch.ops.aten.linear.default: (1, 2),
    torch.ops.aten.addmm.default: (0, 1, 2),
    torch.ops.aten.mm.default: (0, 1),
    torch.ops.aten.matmul.default: (0, 1),
    torch.ops.aten.conv1d.default: (1, 2),
    torch.ops.aten.conv2d.default: (1, 2),
    torch.ops.aten.conv3d.default: (1, 2),
    torch.ops.aten.convolution.default: (1, 2),
}


def lowered(parts: Parts) -> Parts:
    """The parts with weights that only products read in bf16; the others are the model's own.

    Autocast keeps no cast weights outside training, and would cast all of them in every call.
    """
    done: dict[int, Tensor] = {}
    return replace(
        parts, pieces=tuple(_lowered(piece, done) for piece in parts.pieces), uncut=_lowered(parts.uncut, done)
    )


def _lowered(piece: Piece, done: dict[int, Tensor]) -> Piece:
    old = piece.module
    root: dict[str, Tensor] = {}
    for node in old.graph.nodes:
        if node.op != "get_attr":
            continue
        tensor = _found(old, str(node.target))
        if tensor.dtype is torch.float32 and node.users and all(_only_weight(node, user) for user in node.users):
            if id(tensor) not in done:
                done[id(tensor)] = nn.Parameter(tensor.detach().bfloat16(), requires_grad=False)
            tensor = done[id(tensor)]
        root[str(node.target)] = tensor
    graph = fx.Graph()
    graph.output(graph.graph_copy(old.graph, {}))
    return replace(piece, module=fx.GraphModule(root, graph, "Piece"))


def _only_weight(node: fx.Node, user: fx.Node) -> bool:
    """Whether the user reads the node as a weight of a product, and nowhere else."""
    places = PRODUCTS.get(user.target, ())  # type: ignore[call-overload]
    elsewhere = [arg for i, arg in enumerate(user.args) if i not in places]
    found: list[fx.Node] = []
    fx.node.map_arg((elsewhere, user.kwargs), found.append)
    return bool(places) and node not in found


def _found(module: nn.Module, name: str) -> Tensor:
    found: object = module
    for part in name.split("."):
        found = getattr(found, part)
    if not isinstance(found, Tensor):
        raise TypeError(name)
    return found
