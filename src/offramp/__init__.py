"""Early exits for any PyTorch model that save measured time.

    from offramp import attach, train, record, measure, calibrate, Budget, BEEM, Runtime

    model = attach(network, at=("layer1", "layer2"), example=x)       # heads behind two taps
    train(model, examples)                                            # all exits at once
    trace = record(model, held_out)                                   # what every exit says about every row
    costs = measure(model, x)                                         # what every stage and head costs here
    found = calibrate(BEEM, trace, costs, Budget(fraction=0.5))       # a policy for half the cost
    Runtime(model, found.policy)(x)                                   # rows that are done leave the batch

Names are loaded when they are first used, so `import offramp` and `offramp --help` take no time.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offramp.attach import attach
    from offramp.bundle import Bundle, Choice
    from offramp.calibrate import Calibration, Calibrator, EENetFit, ErrorRate, Joint, MaxDrop, Promise, Risk, calibrate
    from offramp.certainty import learn_certainty
    from offramp.check import Checked, check, recalibrate_quantiles
    from offramp.compare import compare
    from offramp.cost import Budget, CostModel
    from offramp.data import Examples
    from offramp.engines import engine
    from offramp.errors import (
        DataError,
        FormatError,
        MissingExtra,
        NoSuchModule,
        NotStageable,
        OfframpError,
        ShapeError,
        ValueRangeError,
    )
    from offramp.heads import MapHead, TokenHead, VectorHead
    from offramp.measure import measure
    from offramp.model import MultiExitModel
    from offramp.objectives import (
        Alternating,
        DepthWeighted,
        Distill,
        EENetLoss,
        FinalOnly,
        SelfDistill,
        TwoStage,
        Uniform,
        Weighted,
    )
    from offramp.onnx import OnnxFile, export
    from offramp.policies import (
        BEEM,
        EERO,
        FPABEE,
        JEIDNN,
        PCEE,
        ZTW,
        AccuracyBins,
        BERxiT,
        EENet,
        Entropy,
        Evidence,
        Fixed,
        Margin,
        MaxProb,
        MSDNet,
        Patience,
        Policy,
        Step,
        Stopping,
        Voting,
        dumps,
        loads,
    )
    from offramp.prediction import Prediction
    from offramp.recipe import Recipe, TrainReport
    from offramp.record import record
    from offramp.runtime import Runtime
    from offramp.simulate import Outcome, simulate
    from offramp.trace import ExitTrace
    from offramp.train import train

    __version__: str

__all__ = [
    "BEEM",
    "EERO",
    "FPABEE",
    "JEIDNN",
    "PCEE",
    "ZTW",
    "AccuracyBins",
    "Alternating",
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
    "Entropy",
    "ErrorRate",
    "Evidence",
    "Examples",
    "ExitTrace",
    "FinalOnly",
    "Fixed",
    "FormatError",
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

_MODULES = {
    "attach": "attach",
    "bundle": "Bundle Choice",
    "calibrate": "Calibration Calibrator EENetFit ErrorRate Joint MaxDrop Promise Risk calibrate",
    "certainty": "learn_certainty",
    "check": "Checked check recalibrate_quantiles",
    "compare": "compare",
    "cost": "Budget CostModel",
    "data": "Examples",
    "engines": "engine",
    "errors": "DataError FormatError MissingExtra NoSuchModule NotStageable OfframpError ShapeError ValueRangeError",
    "heads": "MapHead TokenHead VectorHead",
    "measure": "measure",
    "model": "MultiExitModel",
    "onnx": "OnnxFile export",
    "objectives": "Alternating DepthWeighted Distill EENetLoss FinalOnly SelfDistill TwoStage Uniform Weighted",
    "policies": (
        "AccuracyBins BEEM BERxiT EENet EERO Entropy Evidence FPABEE Fixed JEIDNN MSDNet Margin MaxProb PCEE Patience "
        "Policy Step Stopping Voting ZTW dumps loads"
    ),
    "recipe": "Recipe TrainReport",
    "record": "record",
    "prediction": "Prediction",
    "runtime": "Runtime",
    "simulate": "Outcome simulate",
    "trace": "ExitTrace",
    "train": "train",
}
_HOMES = {name: f"offramp.{module}" for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("offramp")
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'offramp' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """The package: `offramp.train` is the function, also after the submodule of the same name was imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in _HOMES:
            return  # the import system binds a submodule to its parent; `from offramp.train import ...` does without
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
