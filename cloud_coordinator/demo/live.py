"""What a demo shows while it runs: a table that grows on a terminal, one line per round elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Final, Protocol, TextIO

from fleetfed.cloud_coordinator.cli.output import size
from fleetfed.cloud_coordinator.demo.report import RoundFacts

COLUMNS: Final = ("round", "accuracy", "participants", "up", "down", "seconds")
_AROUND: Final = 8
"""Lines of a terminal that the rounds leave to everything else."""


class Screen(Protocol):
    """Where a demo reports."""

    def say(self, text: str) -> None:
        """One line about what happens now."""

    def round(self, facts: RoundFacts) -> None:
        """A round is over."""

    def progress(self, text: str) -> None:
        """What the open round is doing; replaces what was said before."""

    def close(self) -> None:
        """No more rounds."""


def row(facts: RoundFacts, before: RoundFacts | None) -> tuple[str, ...]:
    """A round as text; bytes are those since the round before."""
    up = facts.wire_up - (before.wire_up if before else 0)
    down = facts.wire_down - (before.wire_down if before else 0)
    accuracy = f"{facts.accuracy:.4f}" if facts.accuracy is not None else facts.outcome
    return (str(facts.round), accuracy, str(facts.participants), size(up), size(down), f"{facts.seconds:.2f}")


class Lines:
    """For logs and pipes."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._last: RoundFacts | None = None

    def say(self, text: str) -> None:
        """Print it."""
        print(text, file=self._file, flush=True)

    def round(self, facts: RoundFacts) -> None:
        """Print it on one line, below a head."""
        if self._last is None:
            print("  ".join(f"{name:>12}" for name in COLUMNS), file=self._file)
        print("  ".join(f"{text:>12}" for text in row(facts, self._last)), file=self._file, flush=True)
        self._last = facts

    def progress(self, text: str) -> None:
        """Nothing: it would fill a log."""

    def close(self) -> None:
        """Nothing to do."""


class Table:
    """For terminals."""

    def __init__(self, file: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(file=file, highlight=False)
        self._live: Live | None = None
        self._rounds: list[RoundFacts] = []
        self._progress = ""

    def say(self, text: str) -> None:
        """Print it above the table."""
        self._console.print(text, markup=False)

    def round(self, facts: RoundFacts) -> None:
        """Add a line to the table."""
        self._rounds.append(facts)
        self._update()

    def progress(self, text: str) -> None:
        """Show it below the table."""
        self._progress = text
        self._update()

    def close(self) -> None:
        """Leave the whole table on the screen."""
        if self._live is not None:
            self._progress = ""
            self._live.update(self._render(self._rounds), refresh=True)
            self._live.stop()
            self._live = None

    def _update(self) -> None:
        from rich.live import Live

        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        self._live.update(self._render(self._rounds[-max(1, self._console.size.height - _AROUND) :]), refresh=True)

    def _render(self, rounds: Sequence[RoundFacts]) -> Any:
        from rich import box
        from rich.console import Group
        from rich.table import Table as Grid
        from rich.text import Text

        grid = Grid(box=box.SIMPLE_HEAD)
        for name in COLUMNS:
            grid.add_column(name, justify="right")
        first = len(self._rounds) - len(rounds)
        for number, facts in enumerate(rounds, start=first):
            grid.add_row(*row(facts, self._rounds[number - 1] if number else None))
        return Group(grid, Text(self._progress, style="dim")) if self._progress else grid


def screen(file: TextIO | None = None) -> Screen:
    """The right one for a stream; standard output by default."""
    file = file or sys.stdout
    return Table(file) if file.isatty() else Lines(file)
