"""Rows with labels from files, folders of images and hub data sets."""

from offramp.sources.base import Source
from offramp.sources.columns import Columns, guess_columns
from offramp.sources.labelled import Bad, Labelled, balance, read_labelled, split_rows
from offramp.sources.opening import open_source
from offramp.sources.rows import ImageRows, as_data, bytes_of

__all__ = [
    "Bad",
    "Columns",
    "ImageRows",
    "Labelled",
    "Source",
    "as_data",
    "balance",
    "bytes_of",
    "guess_columns",
    "open_source",
    "read_labelled",
    "split_rows",
]
