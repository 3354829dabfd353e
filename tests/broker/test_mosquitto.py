from __future__ import annotations

import os
from pathlib import Path

import pytest

from fleetfed.broker import mosquitto
from fleetfed.broker.config import BrokerConfig
from fleetfed.broker.mosquitto import MosquittoProcess, find_mosquitto, probe, render_config
from fleetfed.shared.errors import ConfigError
from tests.broker.certificates import Authority
from tests.broker.rawclient import RawClient

installed = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")


def test_2_1_loads_the_acl_as_a_plugin_where_it_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = BrokerConfig(port=1883, acl_file=tmp_path / "acl")
    plugin = Path("/usr/lib/mosquitto_acl_file.so")
    monkeypatch.setattr(mosquitto, "find_acl_plugin", lambda: plugin)
    assert f"acl_file {tmp_path}/acl" in render_config(config, version=(2, 0, 22)).splitlines()
    new = render_config(config, version=(2, 1, 0)).splitlines()
    assert f"global_plugin {plugin}" in new
    assert f"plugin_opt_acl_file {tmp_path}/acl" in new
    assert not any(line.startswith(("acl_file", "per_listener_settings")) for line in new)
    monkeypatch.setattr(mosquitto, "find_acl_plugin", lambda: None)
    assert f"acl_file {tmp_path}/acl" in render_config(config, version=(2, 1, 0)).splitlines()


def test_the_plugin_beside_the_program_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mosquitto, "find_mosquitto", lambda: str(tmp_path / "sbin" / "mosquitto"))
    plugin = tmp_path / "lib" / "x86_64-linux-gnu" / "mosquitto" / "mosquitto_acl_file.so"
    plugin.parent.mkdir(parents=True)
    plugin.touch()
    assert mosquitto.find_acl_plugin() == plugin


def test_persistence_saves_often_or_not_at_all(tmp_path: Path) -> None:
    assert "persistence false" in render_config(BrokerConfig(port=1)).splitlines()
    lines = render_config(BrokerConfig(port=1, persistence_dir=tmp_path)).splitlines()
    assert "autosave_on_changes false" in lines
    assert "autosave_interval 2" in lines
    assert f"persistence_location {tmp_path}/" in lines


def test_without_the_program_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mosquitto, "find_mosquitto", lambda: None)
    with pytest.raises(ConfigError, match="install the package"):
        probe()


@installed
@pytest.mark.mosquitto
def test_the_version_is_known() -> None:
    assert probe() >= (2, 0, 0)


@installed
@pytest.mark.mosquitto
async def test_it_starts_restarts_on_its_port_and_stops(authority: Authority) -> None:
    broker = MosquittoProcess(BrokerConfig(tls=authority.server_files(), plain_port=0))
    await broker.start()
    port, pid = broker.port, broker.pid
    assert pid is not None
    client = await RawClient.connect(port, "a", tls=authority.client_context("a"))
    plain = await RawClient.connect(broker.plain_port or 0, "b")
    await plain.disconnect()
    assert broker.statistics()["rss_bytes"] > 2**20
    await broker.kill()
    await client.closed()
    client.abort()
    assert broker.pid is None
    await broker.start()
    assert broker.port == port
    client = await RawClient.connect(port, "a", tls=authority.client_context("a"))
    await client.disconnect()
    await broker.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@installed
@pytest.mark.mosquitto
async def test_what_keeps_it_from_starting_is_quoted_from_its_log(tmp_path: Path) -> None:
    acl = tmp_path / "acl"
    acl.write_text("nonsense\n")
    broker = MosquittoProcess(BrokerConfig(acl_file=acl), tmp_path)
    with pytest.raises(ConfigError, match="Invalid line in acl_file"):
        await broker.start()
    await broker.stop()
