"""Both brokers let an enrolled device in, and out for good once it was revoked and they have read their files again."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import ssl
from pathlib import Path

import pytest
from fleetfed_testing.enrolment import NOW, Bench
from fleetfed_testing.waiting import PATIENCE

from fleetfed.broker.config import BrokerConfig
from fleetfed.broker.render import load_inventory
from fleetfed.cloud_coordinator.enroll.brokerfiles import replace_all, write_broker_files
from fleetfed.cloud_coordinator.enroll.cli import run_command
from fleetfed.cloud_coordinator.enroll.config import BrokerFiles
from fleetfed.cloud_coordinator.keys.inventory import inventory_of
from fleetfed.cloud_coordinator.keys.keyring import MemberRole, NewMember
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.mqtt.tls import TlsFiles, client_context
from fleetfed.shared.wire.topics import Kind, SiteTopics, Verb
from tests.broker.conftest import KINDS, serve
from tests.broker.rawclient import RawClient

TOPICS = SiteTopics("demo", "north")
LISTED = [pytest.param(False, id="open"), pytest.param(True, id="listed")]


def tls(folder: Path) -> ssl.SSLContext:
    return client_context(TlsFiles(ca=folder / "ca.pem", cert=folder / "cert.pem", key=folder / "key.pem"))


async def connect(port: int, name: str, folder: Path) -> RawClient:
    return await RawClient.connect(port, name, tls=tls(folder / "tls"))


async def refused(port: int, name: str, folder: Path) -> bool:
    client = None
    try:
        client = await connect(port, name, folder)
    except (OSError, ssl.SSLError, asyncio.IncompleteReadError):
        return True
    else:
        await client.close()
        return False


async def shut_out(port: int, folder: Path) -> None:
    """Wait until the broker, which reads its files when it likes, ends the TLS handshake."""
    async with asyncio.timeout(PATIENCE):
        while True:
            client = None
            try:
                client = await RawClient.open(port, tls=tls(folder / "tls"))
                # TLS 1.3: a refusal shows when something is read; somebody who is let in would hear nothing yet.
                async with asyncio.timeout(0.2):
                    if not await client.reader.read(1):
                        return
            except TimeoutError:
                assert client is not None, "no connection"
                client.abort()
            except (OSError, ssl.SSLError):
                return


def write(bench: Bench, *, listed: bool) -> Path:
    settings = BrokerFiles(out=bench.path / "files", listed=listed)
    return write_broker_files(bench.enroller, settings, bench.settings.authority, now=NOW)


@pytest.mark.parametrize("listed", LISTED)
@pytest.mark.parametrize("kind", KINDS)
async def test_a_revoked_device_cannot_connect_any_more(bench: Bench, kind: str, listed: bool) -> None:
    bench.keyring.issue([NewMember(id="broker", role=MemberRole.BROKER, hosts=("localhost",))], now=NOW)
    own = bench.keyring.identity_folder("broker") / "tls"
    gateway_folder = bench.keyring.identity_folder("g-north")
    good, bad = (bench.enrol(name).certificate.id for name in ("good", "bad"))
    current = write(bench, listed=listed)
    config = BrokerConfig(
        tls=TlsFiles(ca=current / "ca.pem", cert=own / "cert.pem", key=own / "key.pem", crl=current / "crl.pem"),
        acl_file=current / "acl",
    )
    with serve(kind, config, None, bench.path / "broker") as running:  # type: ignore[arg-type]
        port = running.port
        gateway = await connect(port, "g-north", gateway_folder)
        await gateway.subscribe(f"{TOPICS.root}/d/+/up/{Verb.UPDATE}")
        live = await connect(port, bad, bench.path / "bad")
        other = await connect(port, good, bench.path / "good")
        for client, name in ((live, bad), (other, good)):
            await client.publish(TOPICS.up(Kind.DEVICE, name, Verb.UPDATE))
        assert {(await gateway.message()).topic.split("/")[4] for _ in range(2)} == {good, bad}

        bench.enroller.revoke([bad], now=NOW)
        write(bench, listed=listed)
        running.reload()
        await shut_out(port, bench.path / "bad")
        assert await refused(port, bad, bench.path / "bad")
        # A live connection is cut, or says nothing that anybody hears.
        with contextlib.suppress(OSError, ssl.SSLError, asyncio.IncompleteReadError, TimeoutError):
            await live.send()
            await live.publish(TOPICS.up(Kind.DEVICE, bad, Verb.UPDATE))
        await other.publish(TOPICS.up(Kind.DEVICE, good, Verb.UPDATE))
        assert [message.topic.split("/")[4] for message in await gateway.waiting()] == [good]
        assert not await refused(port, good, bench.path / "good")
        live.abort()
        for client in (gateway, other):
            await client.close()


async def test_the_services_authority_makes_no_gateway_for_a_listener_of_the_cloud(bench: Bench) -> None:
    bench.keyring.issue([NewMember(id="broker", role=MemberRole.BROKER, hosts=("localhost",))], now=NOW)
    device = bench.enrol("d1").certificate.id
    own = bench.keyring.directory / "tls"
    broker = bench.keyring.identity_folder("broker") / "tls"
    config = BrokerConfig(
        tls=TlsFiles(
            ca=own / "bundle-cloud.crt", cert=broker / "cert.pem", key=broker / "key.pem", crl=own / "crl-cloud.pem"
        )
    )
    with serve("embedded", config, None, bench.path / "broker") as running:  # type: ignore[arg-type]
        assert await refused(running.port, device, bench.path / "d1")
        assert not await refused(running.port, "g-north", bench.keyring.identity_folder("g-north"))


def test_all_files_of_a_broker_change_at_once(tmp_path: Path) -> None:
    for number in range(4):
        replace_all(tmp_path, {"acl": b"%d" % number, "crl.pem": b"%d" % number})
        assert {path.read_bytes() for path in (tmp_path / "current").iterdir()} == {b"%d" % number}
    assert len(list(tmp_path.glob("v-*"))) == 2
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("v-")) == ["current"]


def test_the_inventory_survives_the_way_to_the_service(bench: Bench) -> None:
    assert load_inventory(bench.settings.authority / "inventory.toml") == inventory_of(bench.keyring)


def test_an_id_that_the_authority_gave_to_somebody_else_is_noticed(bench: Bench) -> None:
    bench.enrol("d1", device="d-07")
    bench.keyring.issue([NewMember(id="d-07", role=MemberRole.DEVICE, site="north")], now=NOW)
    assert run_command(["import", "--keys", str(bench.keyring.directory), "--dir", str(bench.folder)]) == 0
    with pytest.raises(ConfigError, match="d-07"):
        write(bench, listed=False)


def test_a_list_of_the_authority_that_grows_old_is_said_and_the_reload_is_run(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    mark = bench.path / "reloaded"
    settings = BrokerFiles(out=bench.path / "files", reload=("touch", str(mark)))
    write_broker_files(bench.enroller, settings, bench.settings.authority, now=NOW)
    assert mark.exists()
    assert not caplog.records
    later = NOW + 80 * 86_400_000
    failing = dataclasses.replace(settings, reload=("false",))
    write_broker_files(bench.enroller, failing, bench.settings.authority, now=later)
    assert "brokers refuse everybody" in caplog.text
    assert "may still have the old files" in caplog.text
    assert os.path.exists(settings.out / "current" / "acl")
