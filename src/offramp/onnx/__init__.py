"""One ONNX file with the exits inside, and how it is run."""

from offramp.onnx.about import read_about
from offramp.onnx.assemble import cascade_of
from offramp.onnx.file import export, export_stages_to
from offramp.onnx.graphs import export_stages
from offramp.onnx.session import OnnxFile

__all__ = ["OnnxFile", "cascade_of", "export", "export_stages", "export_stages_to", "read_about"]
