from __future__ import annotations

from pathlib import Path

import pytest

from fleetfed.broker.config import BrokerConfig
from fleetfed.broker.render import Inventory, Member, load_inventory, render, render_acl
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
