"""Engines: what runs the stages of a model. `engine(model, "onnx", precision="int8")`."""

from offramp.engines.base import Bound, Engine, Staged, Visit, WholeRun
from offramp.engines.choose import ENGINES, about_engines, engine

__all__ = ["ENGINES", "Bound", "Engine", "Staged", "Visit", "WholeRun", "about_engines", "engine"]
