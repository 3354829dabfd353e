"""What an MQTT session raises.

::

    FleetFedError
    ├── SessionLostError         the connection ended before the broker confirmed; say it again if it still matters
    └── RefusedError             the broker said no; carries its reason code
        ├── PublishRefusedError
        └── SubscribeRefusedError
"""

from __future__ import annotations

from typing import Final

from fleetfed.shared.errors import FleetFedError

PACKET_TOO_LARGE: Final = 0x95
"""MQTT 5 section 2.4: the reason code for what exceeds the peer's maximum packet size."""


class SessionLostError(FleetFedError):
    """The connection ended before the broker confirmed.

    The broker may or may not have the message. Nothing is sent again behind the caller's back: whoever still
    needs it publishes it again after the next connect, and receivers deduplicate.
    """


class RefusedError(FleetFedError):
    """The broker said no.

    Attributes:
        topic: the topic or filter.
        code: the MQTT 5 reason code, 0x80 or above.
    """

    def __init__(self, topic: str, code: int) -> None:
        self.topic = topic
        self.code = code
        super().__init__(topic, code)

    def __str__(self) -> str:
        return f"{self.topic}: refused with reason code 0x{self.code:02x}"


class PublishRefusedError(RefusedError):
    """The broker does not take this message; an MQTT 3.1.1 broker cannot say so and confirms it instead."""


class SubscribeRefusedError(RefusedError):
    """The broker does not grant this filter; many grant all and deliver nothing, so success proves little."""


class SessionBusyError(FleetFedError):
    """Too many messages wait to be published already; publish again when one is done."""
