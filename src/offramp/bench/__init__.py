"""Engines, precisions, batch sizes and policies against the plain model, measured: `bench(Subject(...), Plan(...))`."""

from offramp.bench.apart import Opener
from offramp.bench.plan import DEFAULT, Plan, Subject
from offramp.bench.run import bench, left_to_do
from offramp.bench.value import Bench, Cell, EngineFacts

__all__ = ["DEFAULT", "Bench", "Cell", "EngineFacts", "Opener", "Plan", "Subject", "bench", "left_to_do"]
