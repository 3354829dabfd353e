"""What a client asks of an MQTT 5 broker when it connects."""

from __future__ import annotations

from typing import Any

from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from fleetfed.shared.mqtt.config import ConnectionConfig


def connect_properties(config: ConnectionConfig) -> Properties:
    """Properties of the CONNECT packet: keep the session, hold back at our window, nothing larger than we take."""
    # paho's class takes properties as attributes that its annotations do not know.
    properties: Any = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    properties.SessionExpiryInterval = config.session_expiry
    properties.ReceiveMaximum = config.receive_maximum
    properties.MaximumPacketSize = config.max_packet
    typed: Properties = properties
    return typed
