"""What an exported file says of itself."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.errors import FormatError
from offramp.onnx.graphs import with_onnx

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["VERSION", "describe", "parse_about", "read_about"]

#: Where the file keeps it, as JSON.
ABOUT = "offramp"
VERSION = 1


def read_about(path: str | Path) -> dict[str, Any]:
    """What an exported file says of itself: labels, policy, exits, costs, calibration.

    Raises:
        FormatError: it is no ONNX file, or none that Offramp wrote.
    """
    onnx = with_onnx()
    try:
        proto = onnx.load(str(path), load_external_data=False)
        values = {prop.key: prop.value for prop in proto.metadata_props}
    except Exception as error:  # protobuf's own kinds
        raise FormatError(f"{path} is not an ONNX file: {error}. Export it again.") from None
    return parse_about(values, path)


def parse_about(values: Mapping[str, str], path: str | Path) -> dict[str, Any]:
    """The same from a file's metadata."""
    try:
        found = json.loads(values[ABOUT])
        if found["version"] != VERSION:
            raise FormatError(f"{path} is of version {found['version']}; this Offramp reads {VERSION}.")
        return dict(found)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(
            f"{path} was not written by Offramp: it has no exits inside. Export one: offramp export BUNDLE OUT"
        ) from None


def describe(proto: "ModelProto", fields: Mapping[str, Any]) -> None:
    """Nothing; the fields are in the model's metadata, beside what was there."""
    kept = {prop.key: prop.value for prop in proto.metadata_props}
    about = json.loads(kept.get(ABOUT, "{}")) | dict(fields)
    del proto.metadata_props[:]
    prop = proto.metadata_props.add()
    prop.key, prop.value = ABOUT, json.dumps(about)
