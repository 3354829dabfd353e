"""What an operator gives with a command, taken one by one."""

from __future__ import annotations

from typing import Any

from fleetfed.cloud_coordinator.control.errors import CommandError
from fleetfed.shared.wire.messages import Request


class Arguments:
    """A command's arguments, each taken with its type and bounds.

    Raises:
        CommandError: ``invalid``, and which argument; from every method but `rest`.
    """

    def __init__(self, request: Request) -> None:
        self._command = request.command
        self._left = dict(request.arguments)

    def _take(self, name: str, kind: type, default: Any) -> Any:
        value = self._left.pop(name, default)
        if value is None:
            raise CommandError("invalid", f"{self._command}: {name} is missing")
        if type(value) is not kind:
            raise CommandError(
                "invalid", f"{self._command}: {name}: expected {kind.__name__}, found {type(value).__name__}"
            )
        return value

    def text(self, name: str, *, default: str | None = None) -> str:
        """A text of at most 1000 characters."""
        value: str = self._take(name, str, default)
        if len(value) > 1000 or "\0" in value:
            raise CommandError("invalid", f"{self._command}: {name}: at most 1000 characters, none of them NUL")
        return value

    def integer(self, name: str, *, low: int, default: int | None = None) -> int:
        """An integer from ``low`` on; the default may lie below."""
        value: int = self._take(name, int, default)
        if value != default and not low <= value < 2**31:
            raise CommandError("invalid", f"{self._command}: {name}: {value} is not between {low} and {2**31 - 1}")
        return value

    def binary(self, name: str) -> bytes:
        """Bytes."""
        value: bytes = self._take(name, bytes, None)
        return value

    def rest(self) -> dict[str, Any]:
        """Whatever is left."""
        left, self._left = self._left, {}
        return left

    def end(self) -> None:
        """Refuse what nobody took."""
        if self._left:
            raise CommandError("invalid", f"{self._command}: no such argument: {', '.join(sorted(self._left))}")
