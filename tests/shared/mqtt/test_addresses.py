"""Which node comes next, and how addresses are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fleetfed.shared.errors import ConfigError
from fleetfed.shared.mqtt.addresses import STABLE, Addresses
from fleetfed.shared.mqtt.config import ConnectionConfig, split_address
from fleetfed.shared.mqtt.endpoint import Endpoint
from fleetfed.shared.mqtt.tls import TlsFiles

THREE = ("127.0.0.1:2", "127.0.0.1:3")


def config(client_id: str = "d-1", **changes: Any) -> ConnectionConfig:
    return ConnectionConfig(**{"host": "127.0.0.1", "port": 1, "client_id": client_id, "others": THREE, **changes})


def test_every_node_is_tried_before_a_pause() -> None:
    addresses = Addresses(config())
    tried, at_once = [], []
    for _ in range(6):
        tried.append(addresses.config.port)
        at_once.append(addresses.failed())
    assert sorted(tried[:3]) == [1, 2, 3]
    assert tried[:3] == tried[3:]
    assert at_once == [True, True, False] * 2


def test_a_node_that_served_well_is_tried_again_first() -> None:
    addresses = Addresses(config())
    at = addresses.config.port
    assert not addresses.lost(STABLE)
    assert addresses.config.port == at
    assert addresses.lost(STABLE / 2), "a node that throws us out at once is as good as gone"
    assert addresses.config.port != at


def test_a_fleet_spreads_over_the_nodes_and_a_member_finds_its_own_again() -> None:
    begin = [Addresses(config(f"d-{number}")).config.port for number in range(300)]
    assert min(begin.count(port) for port in (1, 2, 3)) > 60
    assert begin == [Addresses(config(f"d-{number}")).config.port for number in range(300)]


def test_a_single_broker_is_tried_after_a_pause_always() -> None:
    addresses = Addresses(config(others=()))
    assert [addresses.failed(), addresses.lost(0.0), addresses.lost(STABLE)] == [False] * 3
    assert addresses.config.port == 1


def test_everything_but_the_address_is_the_same_at_every_node() -> None:
    addresses = Addresses(config(keepalive=7))
    addresses.failed()
    assert (addresses.config.client_id, addresses.config.keepalive, addresses.config.host) == ("d-1", 7, "127.0.0.1")


@pytest.mark.parametrize("text", ["", ":8883", "host:", "host:0", "host:65536", "host:x", "h" * 254, "[::1", "[::1]8"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        split_address(text, 8883)


def test_a_node_elsewhere_needs_tls_as_the_first_one_does(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"n2\.example"):
        config(others=("n2.example:8883",))
    with pytest.raises(ConfigError, match=r"n2\.example"):
        Endpoint(host="localhost", tls=False, others=("n2.example",))
    files = TlsFiles(tmp_path / "ca", tmp_path / "cert", tmp_path / "key")
    assert Addresses(config(others=("n2.example",), tls=files)).failed()


def test_the_broker_table_hands_its_nodes_on(tmp_path: Path) -> None:
    endpoint = Endpoint(host="n1.example", others=("n2.example:8884",))
    assert endpoint.connection(client_id="d-1", identity=tmp_path).others == ("n2.example:8884",)
