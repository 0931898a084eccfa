"""An engine by its name."""

from importlib import import_module

from offramp.engines.base import Engine
from offramp.errors import OfframpError, ValueRangeError
from offramp.model import ExitModel

__all__ = ["ENGINES", "about_engines", "engine"]

#: Where each engine is; modules are loaded when they are asked for, so that nobody pays for another's packages.
HOMES = {
    "eager": "eager.Eager",
    "compiled": "compiled.Compiled",
    "onnx": "onnx.OnnxStages",
    "onnx-file": "onnx.OnnxFileEngine",
}
ENGINES = tuple(HOMES)


def engine(
    model: ExitModel, name: str = "eager", *, precision: str | None = None, threads: int | None = None
) -> Engine:
    """The engine of that name for a model, whatever the policy; `Runtime(model, policy, engine=...)` takes it.

    Args:
        model: from `attach`, or of a bundle.
        name: "eager", "compiled", "onnx" (a session for each visited exit) or "onnx-file" (one graph with all exits).
        precision: "fp32", "bf16", "int8" or "int8-batch", as the engine has it; the model's own unless given.
        threads: that one call may use; torch's number unless given. For "eager" and "compiled" that is a setting of
            the whole process.

    Raises:
        ValueRangeError: there is no such engine, or it does not have the precision, or does not run on the device.
        MissingExtra: its package is not installed.
        NotStageable: the model has no graph that the engine can take.
    """
    if not isinstance(name, str) or name not in HOMES:
        raise ValueRangeError(f"engine is {name!r}; expected one of {', '.join(ENGINES)}.")
    module, kind = HOMES[name].split(".")
    made: Engine = getattr(import_module(f"offramp.engines.{module}"), kind)(model, precision, threads)
    return made


def about_engines(model: ExitModel) -> dict[str, str]:
    """For each engine a line: precisions, threads and how they wait; or why it cannot run this model here."""
    found = {}
    for name in ENGINES:
        module, kind = HOMES[name].split(".")
        try:
            found[name] = getattr(import_module(f"offramp.engines.{module}"), kind).settings(model)
        except OfframpError as error:
            found[name] = f"not here: {error}"
    return found
