from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fleetfed.broker.acl import Access, parse_acl
from fleetfed.broker.config import Bridge, BrokerConfig
from fleetfed.broker.render import Inventory, Member, Uplink, load_inventory, render, render_acl, render_inventory
from fleetfed.broker.service import main
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.mqtt.tls import TlsFiles
from fleetfed.shared.wire.topics import Kind

EXAMPLE = """
fleet = "demo"
operators = ["o-alice"]
[sites]
_ = "c-main"
north = "g-north"
[members]
g-north = { kind = "g", site = "_" }
d-01 = { kind = "d", site = "north" }
"""


def test_an_inventory_is_read(tmp_path: Path) -> None:
    path = tmp_path / "inventory.toml"
    path.write_text(EXAMPLE)
    assert load_inventory(path) == Inventory(
        fleet="demo",
        sites={"_": "c-main", "north": "g-north"},
        operators=("o-alice",),
        members={"g-north": Member(Kind.GATEWAY, "_"), "d-01": Member(Kind.DEVICE, "north")},
    )


def test_the_rendered_file_is_the_one_in_the_documentation() -> None:
    inventory = Inventory(fleet="demo", sites={"north": "g-north"}, members={"d-1": Member(Kind.DEVICE, "north")})
    assert render_acl(inventory) == (
        "# Who may read and write what in fleet demo; rendered, do not edit.\n"
        "\n"
        "user d-1\n"
        "topic write ff1/demo/north/d/d-1/up/+\n"
        "topic read ff1/demo/north/d/d-1/dn/+\n"
        "topic read ff1/demo/north/b/#\n"
        "\n"
        "user g-north\n"
        "topic read ff1/demo/north/d/+/up/+\n"
        "topic write ff1/demo/north/d/+/dn/+\n"
        "topic read ff1/demo/north/g/+/up/+\n"
        "topic write ff1/demo/north/g/+/dn/+\n"
        "topic readwrite ff1/demo/north/b/#\n"
        "topic read $SYS/broker/#\n"
        "\n"
        "pattern write ff1/demo/north/g/%u/up/+\n"
        "pattern read ff1/demo/north/g/%u/dn/+\n"
        "pattern read ff1/demo/north/b/#\n"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fleet = 1\n[sites]\n_ = 'c'", "fleet must be a text"),
        ("fleet = 'Demo!'\n[sites]\n_ = 'c'", "fleet 'Demo!'"),
        ("fleet = 'demo'", "sites must be a table"),
        ("fleet = 'demo'\n[sites]", "no site"),
        ("fleet = 'demo'\n[sites]\n'a b' = 'c'", "site 'a b'"),
        ("fleet = 'demo'\n[sites]\na = '+'", "node of site a"),
        ("fleet = 'demo'\nsite = 1\n[sites]\na = 'c'", "unknown key site"),
        ("fleet = 'demo'\noperators = ['o']\n[sites]\na = 'c'", "operators belong to site '_'"),
        ("fleet = 'demo'\noperators = 'o'\n[sites]\na = 'c'", "operators must be a list"),
        ("fleet = 'demo'\n[sites]\na = 'c'\n[members]\nd = { kind = 'd', site = 'b' }", "site 'b' is not on"),
        ("fleet = 'demo'\n[sites]\na = 'c'\n[members]\nd = { kind = 'o', site = 'a' }", "member d: give"),
        ("fleet = 'demo'\n[sites]\na = 'c'\n[members]\n'#' = { kind = 'd', site = 'a' }", "member '#'"),
        ("fleet = 'demo'\n[sites]\na = 'c'\n[members]\nh = { kind = 'h', site = 'a' }", "helper belongs to site '_'"),
        ("fleet = 'demo'\n[sites]\na = 'c'\n[bridges]\nb = 'g'", "bridge b: g is no gateway"),
        ("fleet = 'demo'\nbridges = 1\n[sites]\na = 'c'", "bridges must be a table"),
        ("fleet = 'demo'\nuplinks = 1\n[sites]\na = 'c'", "uplinks must be a table"),
        ("fleet = 'demo'\n[sites]\na = 'c'\n[uplinks]\nb = { node = 'c' }", "uplink b: give"),
        ("fleet = 'demo'\n[sites]\na = 'c'\n[uplinks]\nb = { node = 'd', site = '_' }", "d serves no site"),
        ("fleet = 'demo'\n[sites]\na = 'c'\n[uplinks]\nb = { node = 'c', site = 'a' }", "nothing leads there"),
        ("fleet = 'demo'\n[sites]\na = 'c'\n[uplinks]\n'+' = { node = 'c', site = '_' }", "bridge '\\+'"),
        ("fleet = ", "inventory.toml"),
    ],
)
def test_a_wrong_inventory_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "inventory.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_inventory(path)


def test_render_writes_both_files(tmp_path: Path) -> None:
    config = BrokerConfig(port=8883, tls=TlsFiles(Path("/pki/ca"), Path("/pki/cert"), Path("/pki/key")))
    inventory = Inventory(fleet="demo", sites={"_": "c-main"})
    acl, conf = render(inventory, config, tmp_path / "out")
    assert acl.read_text() == render_acl(inventory)
    lines = conf.read_text().splitlines()
    for line in (
        "listener 8883 127.0.0.1",
        f"acl_file {acl}",
        "require_certificate true",
        "use_identity_as_username true",
        "use_username_as_clientid true",
        "allow_anonymous false",
        "max_packet_size 262144",
        "cafile /pki/ca",
    ):
        assert line in lines


def test_a_rendered_configuration_needs_a_port(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="port"):
        render(Inventory(fleet="demo", sites={"_": "c-main"}), BrokerConfig(), tmp_path)


def test_the_command_line_renders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "inventory.toml").write_text(EXAMPLE)
    (tmp_path / "broker.toml").write_text("port = 1883")
    out = tmp_path / "out"
    arguments = ["render", "--inventory", str(tmp_path / "inventory.toml"), "--directory", str(out)]
    assert main([*arguments, "--config", str(tmp_path / "broker.toml")]) == 0
    assert capsys.readouterr().out.split() == [str(out / "acl"), str(out / "mosquitto.conf")]
    assert main([*arguments, "--config", str(tmp_path / "none.toml")]) == 2
    assert "none.toml" in capsys.readouterr().err


ABOVE = Inventory(
    fleet="demo",
    sites={"_": "c-main"},
    members={"g-north": Member(Kind.GATEWAY, "_"), "g-south": Member(Kind.GATEWAY, "_")},
    bridges={"b-north": "g-north"},
)
BELOW = Inventory(
    fleet="demo",
    sites={"north": "g-north"},
    members={"d-1": Member(Kind.DEVICE, "north")},
    uplinks={"b-north": Uplink("g-north", "_")},
)
FILES = TlsFiles(Path("/b/ca"), Path("/b/cert"), Path("/b/key"))


def test_a_bridge_acts_for_its_gateway_and_nobody_else() -> None:
    acl = parse_acl(render_acl(ABOVE))

    def may(access: Access, topic: str) -> bool:
        return acl.allows(access, topic, username="b-north", client_id="b-north")

    for verb in ("state", "census", "link", "propose", "reveal", "need"):
        assert may(Access.WRITE, f"ff1/demo/_/g/g-north/up/{verb}")
        assert not may(Access.WRITE, f"ff1/demo/_/g/g-south/up/{verb}")
        assert not may(Access.WRITE, f"ff1/demo/_/g/b-north/up/{verb}"), "it is nobody itself"
    assert may(Access.READ, "ff1/demo/_/g/g-north/dn/commit")
    assert not may(Access.READ, "ff1/demo/_/g/g-south/dn/commit")
    assert may(Access.READ, "ff1/demo/_/b/plan")
    assert not may(Access.WRITE, "ff1/demo/_/b/plan")
    assert not may(Access.READ, "ff1/demo/_/g/g-south/up/state")


def test_a_bridged_site_lets_its_gateway_speak_upwards_and_no_device() -> None:
    acl = parse_acl(render_acl(BELOW))
    own = {"username": "g-north", "client_id": "g-north"}
    assert acl.allows(Access.WRITE, "ff1/demo/_/g/g-north/up/propose", **own)
    assert acl.allows(Access.READ, "ff1/demo/_/g/g-north/up/link", **own)
    assert acl.allows(Access.READ, "ff1/demo/_/b/plan", **own)
    assert not acl.allows(Access.WRITE, "ff1/demo/_/b/plan", **own)
    device = {"username": "d-1", "client_id": "d-1"}
    for topic in ("ff1/demo/_/g/g-north/up/propose", "ff1/demo/_/b/plan", "ff1/demo/_/g/g-north/up/link"):
        assert not acl.allows(Access.WRITE, topic, **device)


def test_the_bridge_carries_what_the_gateway_says_and_hears(tmp_path: Path) -> None:
    config = BrokerConfig(port=1, tls=FILES, bridge=Bridge(host="mqtt.example.org", tls=FILES))
    _, conf = render(BELOW, config, tmp_path, at=Path("/etc/there"))
    lines = conf.read_text().splitlines()
    assert "acl_file /etc/there/acl" in lines
    assert "address mqtt.example.org:8883" in lines
    assert "notification_topic ff1/demo/_/g/g-north/up/link" in lines
    root = "topic ff1/demo/_"
    assert [line for line in lines if line.startswith("topic")] == [
        *(f"{root}/g/g-north/up/{verb} out 1" for verb in ("state", "need", "census", "propose", "reveal")),
        *(f"{root}/g/g-north/dn/{verb} in 1" for verb in ("receipt", "commit")),
        *(f"{root}/b/{what} in 1" for what in ("revoked", "trust", "model", "plan", "node")),
        f"{root}/b/blob/# in 1",
    ]


@pytest.mark.parametrize("uplinks", [{}, {"b-1": Uplink("g-north", "_"), "b-2": Uplink("g-north", "east")}])
def test_a_bridge_carries_one_gateway(tmp_path: Path, uplinks: dict[str, Uplink]) -> None:
    config = BrokerConfig(port=1, tls=FILES, bridge=Bridge(host="h", tls=FILES))
    with pytest.raises(ConfigError, match=f"the inventory has {len(uplinks)} for this broker"):
        render(replace(BELOW, uplinks=uplinks), config, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("inventory", [ABOVE, BELOW])
def test_an_inventory_with_bridges_is_written_as_it_is_read(tmp_path: Path, inventory: Inventory) -> None:
    (tmp_path / "inventory.toml").write_text(render_inventory(inventory))
    assert load_inventory(tmp_path / "inventory.toml") == inventory


def test_the_embedded_broker_has_no_bridge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tls = "tls = { ca = 'ca', cert = 'cert', key = 'key' }"
    (tmp_path / "broker.toml").write_text(f"port = 1883\n[bridge]\nhost = 'h'\n{tls}")
    assert main(["run", "--config", str(tmp_path / "broker.toml")]) == 2
    assert "needs Mosquitto" in capsys.readouterr().err
