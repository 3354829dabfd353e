"""How asking the coordinator can fail; apart from `control_client`, so that naming them imports no MQTT client.

::

    FleetFedError
    ├── CommandError         a command that the coordinator refuses, on its own side
    ├── CommandFailedError   a command did not reach its goal
    ├── NoAnswerError        the broker or the coordinator did not answer
    └── RefusedError         the coordinator answered that it will not
"""

from __future__ import annotations

from fleetfed.shared.errors import FleetFedError


class CommandError(FleetFedError):
    """A command is refused.

    Attributes:
        label: stable, for programs.
        detail: what to do, for people.
    """

    def __init__(self, label: str, detail: str) -> None:
        self.label = label
        self.detail = detail
        super().__init__(label, detail)


class CommandFailedError(FleetFedError):
    """A command did not reach its goal; the message says why and what to do."""


class NoAnswerError(FleetFedError):
    """The broker or the coordinator did not answer; the message says what to check."""


class RefusedError(FleetFedError):
    """The coordinator answered that it will not.

    Attributes:
        label: its stable error label.
        detail: its words.
    """

    def __init__(self, label: str, detail: str) -> None:
        self.label = label
        self.detail = detail
        super().__init__(label, detail)

    def __str__(self) -> str:
        return f"the coordinator refused: {self.detail or self.label}"
