"""What came of exits on a model, as one value: a page, pictures, tables and JSON are made of it."""

from offramp.report.build import build_report, exit_facts, pick_examples, shown_of
from offramp.report.page import to_html, write_html
from offramp.report.picture import to_picture
from offramp.report.value import Example, Measured, Part, Report, Shown

__all__ = [
    "Example",
    "Measured",
    "Part",
    "Report",
    "Shown",
    "build_report",
    "exit_facts",
    "pick_examples",
    "shown_of",
    "to_html",
    "to_picture",
    "write_html",
]
