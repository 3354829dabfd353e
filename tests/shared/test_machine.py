from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

import pytest

from fleetfed.shared.errors import IllegalTransitionError
from fleetfed.shared.machine import Edge, Machine


class Door(StrEnum):
    OPEN = "open"
    SHUT = "shut"


@dataclass(frozen=True)
class Push:
    pass


@dataclass(frozen=True)
class Lock:
    pass


class DoorMachine(Machine[Door]):
    NAME = "door"
    TABLE: ClassVar = {
        (Door.OPEN, Push): Edge("_shut", Door.SHUT),
        (Door.SHUT, Push): Edge("_lie", Door.SHUT),
        (Door.SHUT, Lock): Edge("_stay"),
    }

    def _shut(self, event: Push, now: int) -> list[str]:
        self.state = Door.SHUT
        return [f"shut at {now}"]

    def _lie(self, event: Push, now: int) -> list[str]:
        self.state = Door.OPEN
        return []

    def _stay(self, event: Lock, now: int) -> list[str]:
        return ["click"]


def test_an_event_takes_its_edge() -> None:
    door = DoorMachine(Door.OPEN)
    assert door.handle(Push(), 5) == ["shut at 5"]
    assert door.state is Door.SHUT
    assert door.handle(Lock(), 6) == ["click"]


def test_an_event_without_an_edge_raises_with_the_story_and_changes_nothing() -> None:
    door = DoorMachine(Door.OPEN)
    door.handle(Push(), 5)
    door.handle(Lock(), 6)
    door.state = Door.OPEN
    with pytest.raises(IllegalTransitionError) as caught:
        door.handle(Lock(), 7)
    assert "5 open --Push--> shut" in str(caught.value)
    assert door.state is Door.OPEN


def test_a_method_that_leaves_its_table_is_caught() -> None:
    with pytest.raises(AssertionError, match="not in the table"):
        DoorMachine(Door.SHUT).handle(Push(), 1)


def test_the_diagram_is_drawn_from_the_table() -> None:
    assert DoorMachine.diagram().splitlines() == [
        "stateDiagram-v2",
        "    open --> shut: Push",
        "    shut --> shut: Lock",
        "    shut --> shut: Push",
    ]
