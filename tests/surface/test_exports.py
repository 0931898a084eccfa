import ast
import importlib
import inspect

import pytest
from sources import modules

import offramp

PUBLIC = [
    "AccuracyBins",
    "Alternating",
    "BEEM",
    "BERxiT",
    "Budget",
    "Bundle",
    "Calibration",
    "Calibrator",
    "Checked",
    "Choice",
    "CostModel",
    "DataError",
    "DepthWeighted",
    "Distill",
    "EENet",
    "EENetFit",
    "EENetLoss",
    "EERO",
    "Entropy",
    "ErrorRate",
    "Evidence",
    "Examples",
    "ExitTrace",
    "FPABEE",
    "FinalOnly",
    "Fixed",
    "FormatError",
    "JEIDNN",
    "Joint",
    "MSDNet",
    "MapHead",
    "Margin",
    "MaxDrop",
    "MaxProb",
    "MissingExtra",
    "MultiExitModel",
    "NoSuchModule",
    "NotStageable",
    "OfframpError",
    "OnnxFile",
    "Outcome",
    "PCEE",
    "Patience",
    "Policy",
    "Prediction",
    "Promise",
    "Recipe",
    "Risk",
    "Runtime",
    "SelfDistill",
    "ShapeError",
    "Step",
    "Stopping",
    "TokenHead",
    "TrainReport",
    "TwoStage",
    "Uniform",
    "ValueRangeError",
    "VectorHead",
    "Voting",
    "Weighted",
    "ZTW",
    "__version__",
    "attach",
    "calibrate",
    "check",
    "compare",
    "dumps",
    "engine",
    "export",
    "learn_certainty",
    "loads",
    "measure",
    "recalibrate_quantiles",
    "record",
    "simulate",
    "train",
]


def test_the_public_names_are_exactly_these() -> None:
    assert sorted(offramp.__all__) == sorted(PUBLIC)
    assert set(PUBLIC) <= set(dir(offramp))


def test_names_for_readers_and_for_type_checkers_are_the_same() -> None:
    tree = modules()["offramp"]
    block = next(n for n in tree.body if isinstance(n, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == offramp._HOMES
    assert set(seen) == set(PUBLIC) - {"__version__"}


@pytest.mark.parametrize("name", [n for n in PUBLIC if n != "__version__"])
def test_public_names_are_documented(name: str) -> None:
    value = getattr(offramp, name)
    assert inspect.getdoc(value), name
    assert not inspect.ismodule(value)


def test_version() -> None:
    assert offramp.__version__.count(".") == 2


def test_an_unknown_name_is_told() -> None:
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        offramp.atach  # noqa: B018


@pytest.mark.parametrize("name", [n for n in modules() if n != "offramp"])
def test_all_is_exact(name: str) -> None:
    """Every public function and class of a module is in its `__all__`, and everything in it exists."""
    tree = modules()[name]
    listed = getattr(importlib.import_module(name), "__all__", None)
    assert listed is not None or not tree.body, f"{name} has no __all__"
    defined = {
        n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")
    }
    assert defined <= set(listed or ()), f"{name}: {sorted(defined - set(listed or ()))} not in __all__"
    assert len(set(listed or ())) == len(listed or ())
    for exported in listed or ():
        assert hasattr(importlib.import_module(name), exported), f"{name}.{exported}"
