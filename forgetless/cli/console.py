"""What a person sees while the study runs: one line per event, and a bar where there is a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..study.train import Step


class Ui:
    """Messages and progress bars, on standard output; errors belong on standard error."""

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console = console or Console(quiet=quiet, highlight=False)
        if not self.console.is_terminal and self.console.width < 180:
            self.console.width = 180  # a file or a pipe has no edge to wrap at

    def say(self, text: str) -> None:
        """One plain line; markup in it is not interpreted."""
        self.console.print(escape(text), soft_wrap=True)

    @contextmanager
    def training(self, title: str, steps: int) -> Iterator[Callable[[Step], None]]:
        """A bar over ``steps``; yields what to call after each step."""
        progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        with progress:
            task = progress.add_task(escape(title), total=steps, shown="")

            def on_step(step: Step) -> None:
                shown = f"loss {step.loss:.3f}" + (f"  penalty {step.penalty:.3f}" if step.penalty else "")
                progress.update(task, completed=step.number, shown=shown)

            yield on_step
