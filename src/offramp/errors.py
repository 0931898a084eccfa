"""Every error that Offramp raises on purpose.

    OfframpError
    ├── ShapeError(ValueError)        a tensor has the wrong shape or dtype
    ├── ValueRangeError(ValueError)   a number or label lies outside what is allowed, or is not finite
    ├── NoSuchModule(LookupError)     `at` names a module that the model does not have
    ├── NotStageable(RuntimeError)    the model cannot be cut at an exit; training and recording still work
    ├── DataError(ValueError)         a data set cannot be used as it is
    ├── FormatError(ValueError)       a file is not what it should be, is damaged, or is from a newer version
    ├── ProcessLost(RuntimeError)      another process of a run that several share is gone
    └── MissingExtra(ImportError)     an optional package is not installed; the message names the extra

A message says what was got, what was expected, and what to do.
"""

__all__ = [
    "DataError",
    "FormatError",
    "MissingExtra",
    "NoSuchModule",
    "NotStageable",
    "OfframpError",
    "ProcessLost",
    "ShapeError",
    "ValueRangeError",
    "first_line",
]


class OfframpError(Exception):
    """The root of all errors that Offramp raises on purpose."""


class ShapeError(OfframpError, ValueError):
    """A tensor has the wrong shape or dtype."""


class ValueRangeError(OfframpError, ValueError):
    """A number or a label lies outside what is allowed, or is not finite."""


class NoSuchModule(OfframpError, LookupError):
    """`at` names a module that the model does not have."""


class NotStageable(OfframpError, RuntimeError):
    """The model cannot be cut at an exit. Training, recording and calibrating still work; the runtime does not."""


class DataError(OfframpError, ValueError):
    """A data set cannot be used as it is."""


class FormatError(OfframpError, ValueError):
    """A file is not what it should be, is damaged, or comes from a newer version."""


class ProcessLost(OfframpError, RuntimeError):
    """Another process of a run that several processes share ended, or cannot be reached."""


class MissingExtra(OfframpError, ImportError):
    """An optional package is not installed. The message names the extra to install."""


def first_line(error: BaseException, most: int = 200) -> str:
    """What another package's error says, as far as it fits into a sentence of ours; its kind where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:most]
