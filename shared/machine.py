"""The frame of every state machine: a table of transitions, a story, invariants, and a diagram drawn from the table.

A machine decides and does nothing else: `Machine.handle` takes an event and the time and returns instructions; the
role's ``runtime.py`` performs them and feeds what comes of it back as events. No clock, no randomness, no I/O.

>>> class Light(StrEnum):
...     OFF = "off"
...     ON = "on"
>>> @dataclass(frozen=True)
... class Pressed: ...
>>> class Lamp(Machine[Light]):
...     NAME = "lamp"
...     TABLE = {
...         (Light.OFF, Pressed): Edge("_switch", Light.ON),
...         (Light.ON, Pressed): Edge("_switch", Light.OFF),
...     }
...     def _switch(self, event, now):
...         self.state = Light.ON if self.state is Light.OFF else Light.OFF
...         return [f"light {self.state}"]
>>> Lamp(Light.OFF).handle(Pressed(), now=0)
['light on']
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Generic, TypeVar

from fleetfed.shared.errors import IllegalTransitionError

S = TypeVar("S", bound=StrEnum)

_STORY_LENGTH = 40


class Edge:
    """One row of a table: the method that handles the event, and the states that it may end in.

    Args:
        method: name of a method ``(event, now) -> list of instructions``.
        targets: states that the machine may be in afterwards; none means that it stays where it is.
    """

    __slots__ = ("method", "targets")

    def __init__(self, method: str, *targets: StrEnum) -> None:
        self.method = method
        self.targets = targets


class Machine(Generic[S]):
    """A state machine; subclasses give `NAME`, `TABLE` and one method per kind of edge.

    Everything that changes the machine goes through `handle`. Times are unix milliseconds.
    """

    NAME: ClassVar[str]
    TABLE: ClassVar[dict[tuple[Any, type], Edge]]

    def __init__(self, state: S) -> None:
        self.state: S = state
        self._story: deque[str] = deque(maxlen=_STORY_LENGTH)

    @property
    def story(self) -> tuple[str, ...]:
        """The last events handled, oldest first, each with the time and the states around it."""
        return tuple(self._story)

    def handle(self, event: object, now: int) -> list[Any]:
        """Handle one event; return what is to be done, in order.

        Raises:
            IllegalTransitionError: the table has no row for this event in this state; nothing has changed.
        """
        before = self.state
        edge = self.TABLE.get((before, type(event)))
        if edge is None:
            raise IllegalTransitionError(self.NAME, str(before), type(event).__name__, self.story)
        instructions: list[Any] = getattr(self, edge.method)(event, now)
        allowed = edge.targets or (before,)
        assert self.state in allowed, (
            f"{self.NAME}: {before} --{type(event).__name__}--> {self.state}, not in the table"
        )
        self._story.append(f"{now} {before} --{type(event).__name__}--> {self.state}")
        return instructions

    def next_deadline(self) -> int | None:
        """When the machine next wants a timer event, in unix milliseconds; None for never."""
        return None

    def validate(self) -> None:
        """Assert every invariant; tests call it after each event."""

    @classmethod
    def diagram(cls) -> str:
        """The table as a Mermaid state diagram, as the documentation shows it."""
        lines = {
            f"    {source} --> {target}: {event.__name__}"
            for (source, event), edge in cls.TABLE.items()
            for target in edge.targets or (source,)
        }
        return "\n".join(("stateDiagram-v2", *sorted(lines)))


@dataclass(frozen=True, slots=True)
class TimerFired:
    """The time that `Machine.next_deadline` named has come."""
