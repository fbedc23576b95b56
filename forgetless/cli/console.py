"""What a person sees while the study runs: one line per event, a bar on a terminal, lines now and then elsewhere."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..study.tables import Table
from ..study.train import Step

#: Seconds between two lines of a training off a terminal, at least.
EVERY = 10.0


class Ui:
    """Messages and progress bars, on standard output; errors belong on standard error."""

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console = console or Console(quiet=quiet, highlight=False)
        if not self.console.is_terminal and self.console.width < 180:
            self.console.width = 180  # a file or a pipe has no edge to wrap at

    def say(self, text: str) -> None:
        """One plain line; markup in it is not interpreted."""
        self.console.print(escape(text), soft_wrap=True)

    def table(self, table: Table) -> None:
        """A table below what was said."""
        self.console.print(table.rich())

    @contextmanager
    def training(self, title: str, steps: int) -> Iterator[Callable[[Step], None]]:
        """A bar over ``steps``, or off a terminal a line now and then; yields what to call after each step."""
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
            rates: list[float] = []
            said = -math.inf

            def on_step(step: Step) -> None:
                nonlocal said
                shown = f"loss {step.loss:.3f}" + (f"  penalty {step.penalty:.3f}" if step.penalty else "")
                progress.update(task, completed=step.number, shown=shown)
                rates.append(step.seconds)
                now = time.monotonic()
                if self.console.is_terminal or now - said < EVERY and step.number < steps:
                    return
                said = now
                drift = "" if step.drift is None else f"  drift {step.drift:.4f}"
                speed = f"{step.tokens / max(step.seconds, 1e-9):,.0f} tokens/s"
                left = timedelta(seconds=round(statistics.median(rates[-50:]) * (steps - step.number)))
                self.say(f"{title}  step {step.number}/{steps}  {shown}{drift}  {speed}  {left} left")

            yield on_step
