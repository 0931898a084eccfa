"""One ONNX file with the exits inside, and how it is run."""

from offramp.onnx.about import read_about
from offramp.onnx.file import cascade_of, export
from offramp.onnx.graphs import export_stages
from offramp.onnx.session import OnnxFile

__all__ = ["OnnxFile", "cascade_of", "export", "export_stages", "read_about"]
