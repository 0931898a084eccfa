"""The command line: `offramp --help`. Nothing heavy is imported before a command runs."""

from offramp.cli.app import app, main

__all__ = ["app", "main"]
