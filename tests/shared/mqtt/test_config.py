from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fleetfed.shared.errors import ConfigError
from fleetfed.shared.mqtt.config import ConnectionConfig, Protocol, is_loopback
from fleetfed.shared.mqtt.tls import TlsFiles

TLS = {"ca": "ca.crt", "cert": "d-1.crt", "key": "/etc/keys/d-1.key"}


def test_table_becomes_a_config_with_paths_from_its_folder() -> None:
    config = ConnectionConfig.from_table(
        {"host": "broker.example", "tls": TLS, "protocol": "3.1.1"},
        Path("/etc/fleetfed"),
        client_id="d-1",
        keepalive=60,
    )
    assert config.tls == TlsFiles(
        Path("/etc/fleetfed/ca.crt"), Path("/etc/fleetfed/d-1.crt"), Path("/etc/keys/d-1.key")
    )
    assert (config.client_id, config.keepalive, config.port) == ("d-1", 60, 8883)
    assert config.protocol is Protocol.V311


def test_table_wins_over_defaults() -> None:
    config = ConnectionConfig.from_table({"host": "localhost", "keepalive": 7}, Path(), client_id="d-1", keepalive=60)
    assert config.keepalive == 7


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"host": "localhost", "hots": 1}, "hots"),
        ({}, "host"),
        ({"host": "localhost", "port": 70000}, "port"),
        ({"host": "localhost", "keepalive": 0}, "keepalive"),
        ({"host": "localhost", "keepalive": True}, "keepalive"),
        ({"host": "broker.example"}, r"\[tls\]"),
        ({"host": "10.0.0.1"}, r"\[tls\]"),
        ({"host": "broker.example", "tls": {"ca": "a", "cert": "b"}}, "key"),
        ({"host": "broker.example", "tls": {**TLS, "insecure": True}}, "insecure"),
        ({"host": "localhost", "receive_maximum": 9, "queue_messages": 8}, "receive_maximum"),
        ({"host": "localhost", "client_id": ""}, "client_id"),
    ],
)
def test_bad_table_is_refused_by_key(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ConnectionConfig.from_table(table, Path(), where="gateway.toml", **({"client_id": "g-1"} | {}))


def test_client_id_has_no_default() -> None:
    with pytest.raises(ConfigError, match="client_id"):
        ConnectionConfig(host="localhost")


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("localhost", True), ("127.0.0.1", True), ("::1", True), ("127.8.8.8", True), ("0.0.0.0", False), ("a.b", False)],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback
