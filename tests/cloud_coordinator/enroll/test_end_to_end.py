"""A whole fleet of real processes: a device enrols over HTTPS, takes part, is revoked, and is heard no more."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest
from fleetfed_testing.brokers import free_port
from fleetfed_testing.local_fleet import LocalFleet, prepared
from fleetfed_testing.waiting import PATIENCE

from fleetfed.cloud_coordinator.demo import layout
from fleetfed.cloud_coordinator.demo.layout import BROKER, COORDINATOR, OPERATOR, WATCHER, toml
from fleetfed.cloud_coordinator.enroll.cli import run_command
from fleetfed.cloud_coordinator.keys.equip import follow
from fleetfed.cloud_coordinator.keys.keyring import MemberRole, NewMember
from fleetfed.device.cli import main as device_command
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.trust.identity import Identity


class Enrolment:
    """The service of a local fleet, as a process."""

    def __init__(self, fleet: LocalFleet) -> None:
        self.fleet = fleet
        self.folder = fleet.folder.path / "enroll"
        self.keys = fleet.folder.keys
        self.port = free_port()
        self.ca = self.keys / "identities" / "enroller" / "tls" / "ca.pem"
        self.watcher = fleet.folder.path / "watcher.toml"

    def set_up(self) -> None:
        """What an operator does once."""
        keyring = self.fleet.lay_out()
        issued = keyring.issue(
            [NewMember(id="enroller", role=MemberRole.ENROLLER, hosts=("localhost",))], now=unix_ms()
        )
        assert follow(keyring, issued, now=unix_ms()) == []
        identities = self.keys / "identities"
        self.command("init", "--identity", identities / "enroller", "--keys", self.keys)
        key = Identity.load(identities / "enroller").key.public.hex()
        members = [COORDINATOR, OPERATOR, WATCHER, *(gateway.id for gateway in self.fleet.tree.gateways)]
        assert run_command(["pin", "--key", key, *(str(identities / name) for name in members)]) == 0
        table = {
            "identity": "identity",
            "state": "state",
            "authority": "authority",
            "host": "127.0.0.1",
            "port": self.port,
            "broker": {"out": "broker"},
        }
        (self.folder / "enroll.toml").write_text(toml(table))
        self.command("files")
        operator = {"identity": str(identities / WATCHER), "broker": {"host": layout.HOST, "port": self.fleet.port}}
        self.watcher.write_text(toml(operator))
        path = self.fleet.folder.role(BROKER) / "broker.toml"
        own, current = identities / BROKER / "tls", self.folder / "broker" / "current"
        broker = {
            "host": layout.HOST,
            "port": self.fleet.port,
            "acl_file": str(current / "acl"),
            "persistence_dir": "state",
            "sys_interval": 0,
            "tls": {
                "ca": str(current / "ca.pem"),
                "cert": str(own / "cert.pem"),
                "key": str(own / "key.pem"),
                "crl": str(current / "crl.pem"),
            },
        }
        path.write_text(toml(broker))

    def command(self, *arguments: object) -> None:
        assert run_command([*map(str, arguments), "--dir", str(self.folder)]) == 0

    async def start(self) -> None:
        command = (sys.executable, "-P", "-m", "fleetfed.cloud_coordinator.enroll", "run", "--dir", str(self.folder))
        supervisor = self.fleet.fleet.supervisor
        running = await supervisor.start("enroller", command, pipe=True)
        await supervisor.wait_line(running, "listening on ", timeout=PATIENCE)

    def enrol(self, name: str, token: str) -> str:
        """The device's side; its settings then name the new identity."""
        # The trainers of tests know a device's number by the name of its identity folder.
        identity = self.fleet.folder.role(name) / name
        url = f"https://localhost:{self.port}"
        command = [
            "enroll",
            "--url",
            url,
            "--ca",
            self.ca,
            "--identity",
            identity,
            "--hardware",
            name,
            "--token",
            token,
        ]
        assert device_command([*map(str, command)]) == 0
        settings = self.fleet.folder.config(name)
        issued = str(Path("..") / "keys" / "identities" / name)
        settings.write_text(settings.read_text().replace(f'"{issued}"', f'"{name}"'))
        return Identity.load(identity).certificate.id

    def reload_broker(self) -> None:
        os.kill(self.fleet.fleet.supervisor.pid(BROKER), signal.SIGHUP)


async def test_a_device_enrols_takes_part_and_is_shut_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rounds = {"quorum_fraction": 0.5, "quorum_minimum": 1, "start_when": 2}
    async with prepared(tmp_path, devices=2, rounds=rounds) as fleet:
        service = Enrolment(fleet)
        await asyncio.to_thread(service.set_up)
        await service.start()
        capsys.readouterr()
        issued, enrolled = fleet.tree.devices
        await asyncio.to_thread(service.command, "token", "create", "--owner", "ward-3", "--site", enrolled.site)
        device = await asyncio.to_thread(service.enrol, enrolled.id, capsys.readouterr().out.strip())
        await fleet.start_broker()
        gateways = [gateway.id for gateway in fleet.tree.gateways]
        await asyncio.gather(*(fleet.start_again(name) for name in (COORDINATOR, *gateways, issued.id, enrolled.id)))
        await fleet.connect()

        await fleet.begin(1, quorum_fraction=1.0)
        assert (await fleet.finished(1))["contributors"] == 2

        fleet.hold(issued.id, enrolled.id)
        await fleet.begin(1)
        await fleet.training(enrolled.id)
        await asyncio.to_thread(service.command, "revoke", device, "--config", service.watcher)
        assert "The coordinator has the new list" in capsys.readouterr().out
        fleet.release(enrolled.id)
        await said(fleet.folder.logs / f"{gateways[0]}.log", f"refused message of {device}: revoked")
        fleet.release(issued.id)
        assert (await fleet.finished(2))["contributors"] == 1

        service.reload_broker()
        # Its TLS certificate is on the broker's list now: it is cut off, and does not come back.
        await said(fleet.folder.logs / f"{enrolled.id}.log", "cannot connect to ")


async def said(path: Path, words: str) -> None:
    """Wait until another process has written something."""
    async with asyncio.timeout(PATIENCE):
        while words not in path.read_text():  # noqa: ASYNC110, ASYNC240 - it tells by a file
            await asyncio.sleep(0.02)
