"""What a broker counts, and how it is shown below ``$SYS``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """What happened since the broker started; each only grows."""

    connections: int = 0
    connections_refused: int = 0
    bytes_received: int = 0
    bytes_sent: int = 0
    messages_received: int = 0
    messages_sent: int = 0
    dropped_offline: int = 0
    """QoS 1 and 2 messages for an offline session beyond its bounds."""
    dropped_qos0: int = 0
    """QoS 0 messages for a subscriber that is too slow."""
    dropped_too_large: int = 0
    """Messages larger than the subscriber takes."""
    expired: int = 0
    denied_publish: int = 0
    denied_delivery: int = 0
    retained_refused: int = 0
    acknowledgements_delayed: int = 0
    stalled_disconnected: int = 0
    keepalive_timeouts: int = 0
    protocol_errors: int = 0
    rate_limited: int = 0
    takeovers: int = 0
    theft_refused: int = 0
    wills: int = 0


def system_topics(values: Mapping[str, int], uptime: float) -> Iterator[tuple[str, str]]:
    """The ``$SYS`` topics and payloads, named as Mosquitto names them.

    Args:
        values: the broker's statistics.
        uptime: seconds since it started.
    """
    yield "$SYS/broker/uptime", f"{int(uptime)} seconds"
    for name, value in (
        ("clients/connected", values["clients_connected"]),
        ("clients/disconnected", values["sessions"] - values["clients_connected"]),
        ("clients/total", values["sessions"]),
        ("subscriptions/count", values["subscriptions"]),
        ("bytes/received", values["bytes_received"]),
        ("bytes/sent", values["bytes_sent"]),
        ("publish/messages/received", values["messages_received"]),
        ("publish/messages/sent", values["messages_sent"]),
        ("publish/messages/dropped", values["dropped"]),
        ("publish/messages/denied", values["denied_publish"]),
        ("retained messages/count", values["retained_messages"]),
        ("store/messages/count", values["queued_messages"]),
        ("store/messages/bytes", values["queued_bytes"] + values["offline_bytes"]),
    ):
        yield f"$SYS/broker/{name}", str(value)
