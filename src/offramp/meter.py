"""A progress bar with the time left, and lines that stay, on standard error."""

from types import TracebackType
from typing import Any

__all__ = ["Meter", "duration"]


class Meter:
    """A bar over `total` steps; silent when `show` is false. Where there is no terminal, only lines are written."""

    def __init__(self, what: str, total: int | None, show: bool, done: int = 0):
        self.what, self.total, self.done = what, total, done
        self._bar: Any = self._make() if show else None
        self._task: Any = None

    def _make(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True, soft_wrap=True, highlight=False)
        return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)

    def __enter__(self) -> "Meter":
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self.what, total=self.total, completed=self.done)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, text: str | None = None) -> None:
        """Nothing; one step is done, and `text` stands before the bar from now on."""
        self.done += 1
        if self._bar is not None:
            self._bar.update(self._task, advance=1, description=text or self.what)

    def line(self, text: str) -> None:
        """Nothing; the text is written as a line of its own above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False)


def duration(seconds: float) -> str:
    """A time in words: "12 s", "6 min 05 s", "1 h 20 min"."""
    whole = round(seconds)
    if whole < 90:
        return f"{whole} s"
    if whole < 5400:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
