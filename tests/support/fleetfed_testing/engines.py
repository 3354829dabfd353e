"""Brokers to grow into, each started for one fleet from the configuration files that are shipped.

`install.sh` unpacks the programs into ``.brokers``; ``FLEETFED_BROKERS`` names another folder, and what is installed
on the machine is found, too.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Final

import pytest

from fleetfed.broker.engines import Engine, render_rights
from fleetfed.cloud_coordinator.demo.layout import BROKER
from fleetfed.cloud_coordinator.keys.inventory import inventory_of
from fleetfed.cloud_coordinator.keys.keyring import Keyring
from fleetfed_testing.brokers import free_port
from fleetfed_testing.local_fleet import LocalFleet
from fleetfed_testing.waiting import PATIENCE

REPOSITORY: Final = Path(__file__).parents[3]
SHIPPED: Final = REPOSITORY / "deploy" / "brokers"
UNPACKED: Final = Path(os.environ.get("FLEETFED_BROKERS", REPOSITORY / ".brokers"))
_HOW: Final = "run tests/brokers/install.sh, or install the Debian package"


def find(*names: str) -> str:
    """A program's path; skips the test where there is none."""
    places = [str(UNPACKED / each) for each in ("usr/sbin", "usr/lib/erlang/bin", "usr/bin")]
    for name in names:
        inside = UNPACKED / name
        found = str(inside) if inside.exists() else shutil.which(Path(name).name, path=os.pathsep.join(places))
        if found := found or shutil.which(Path(name).name, path=os.environ.get("PATH", "") + ":/usr/sbin"):
            return found
    pytest.skip(f"{names[-1]} is not here: {_HOW}")


def tls_into(folder: Path, keyring: Keyring) -> None:
    """Put the broker's identity where its configuration expects it."""
    folder.mkdir(parents=True)
    for name in ("ca", "cert", "key"):
        shutil.copy(keyring.identity_folder(BROKER) / "tls" / f"{name}.pem", folder / f"{name}.pem")


async def listening(fleet: LocalFleet, name: str, port: int) -> None:
    """Return as soon as a program takes connections on ``port``."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                failed = fleet.fleet.supervisor.failed
                assert not failed.done(), failed.result()
                await asyncio.sleep(0.05)
                continue
            writer.close()
            return


class RabbitMq:
    """One node of RabbitMQ with its MQTT plugin."""

    def __init__(self) -> None:
        home = UNPACKED / "usr/lib/rabbitmq/lib"
        found = sorted(home.glob("rabbitmq_server-*/sbin/rabbitmq-server")) or sorted(
            Path("/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*/sbin/rabbitmq-server")
        )
        if not found:
            pytest.skip(f"rabbitmq-server is not here: {_HOW}")
        self._server = str(found[-1])
        self.version = tuple(int(part) for part in found[-1].parents[1].name.split("-")[1].split("."))
        self._erl = find("usr/lib/erlang/bin/erl", "erl")
        self._epmd = find("usr/lib/erlang/bin/epmd", "epmd")
        self.ports = [free_port()]
        self._epmd_port, self._dist_port = free_port(), free_port()

    def lay_out(self, folder: Path, keyring: Keyring) -> None:
        """Write the node's files."""
        self._folder = folder
        tls_into(folder / "fleetfed", keyring)
        render_rights(Engine.RABBITMQ, inventory_of(keyring), folder)
        shutil.copy(SHIPPED / "rabbitmq" / "enabled_plugins", folder)
        text = (SHIPPED / "rabbitmq" / "rabbitmq.conf").read_text()
        assert "/etc/rabbitmq" in text
        text = text.replace("/etc/rabbitmq", str(folder)).replace("default = 8883", f"1 = 127.0.0.1:{self.ports[0]}")
        (folder / "rabbitmq.conf").write_text(text)

    async def start(self, fleet: LocalFleet, name: str = BROKER) -> None:
        """Start the node; also after it was stopped or killed."""
        if "epmd" not in fleet.fleet.supervisor.names():
            # Erlang would start one that outlives the test.
            command = (self._epmd, "-port", str(self._epmd_port), "-address", "127.0.0.1")
            await fleet.fleet.supervisor.start("epmd", command)
            await listening(fleet, "epmd", self._epmd_port)
        await fleet.fleet.supervisor.start(name, (self._server,), environment=self._environment())
        await listening(fleet, name, self.ports[0])

    def _environment(self) -> dict[str, str]:
        return {
            "PATH": os.pathsep.join((str(Path(self._erl).parent), os.environ.get("PATH", ""))),
            "HOME": str(self._folder),
            "ERL_EPMD_PORT": str(self._epmd_port),
            "RABBITMQ_NODENAME": "fleetfed@localhost",
            "RABBITMQ_DIST_PORT": str(self._dist_port),
            "RABBITMQ_CONFIG_FILE": str(self._folder / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self._folder / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(self._folder / "data"),
            "RABBITMQ_LOG_BASE": str(self._folder / "log"),
            "RABBITMQ_LOGS": "-",
            # The script then becomes the server, so that a signal reaches it.
            "RABBITMQ_ALLOW_INPUT": "1",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-noinput",
        }

    def throw_out(self, fleet: LocalFleet, name: str) -> None:
        """Take a member's rights away, as the documentation says."""
        del fleet
        control = Path(self._server).with_name("rabbitmqctl")
        environment = {**os.environ, **self._environment()}
        # It may listen before it takes commands.
        for command in (("await_startup",), ("delete_user", name), ("close_all_user_connections", name, "revoked")):
            done = subprocess.run([control, *command], env=environment, check=False, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr

    def forget(self) -> None:
        """What the disk held is gone."""
        shutil.rmtree(self._folder / "data")


class Nats:
    """A cluster of NATS servers with JetStream."""

    def __init__(self, nodes: int = 3) -> None:
        self._server = find("usr/sbin/nats-server", "nats-server")
        self.names = [f"n{number + 1}" for number in range(nodes)]
        self.ports = [free_port() for _ in self.names]
        self.plain_nats = [free_port() for _ in self.names]
        self._routes = [free_port() for _ in self.names]

    def lay_out(self, folder: Path, keyring: Keyring) -> None:
        """Write the nodes' files."""
        self._folder = folder
        tls_into(folder / "tls", keyring)
        render_rights(Engine.NATS, inventory_of(keyring), folder)
        text = (SHIPPED / "nats" / "nats.conf").read_text()
        assert "/etc/nats" in text
        (folder / "nats.conf").write_text(text.replace("/etc/nats", str(folder)))
        script = SHIPPED / "nats" / "route-certificates.sh"
        subprocess.run([script, folder / "routes", "127.0.0.1"], check=True, capture_output=True)

    async def start(self, fleet: LocalFleet, name: str = BROKER) -> None:
        """Start all nodes, or the one with that name again."""
        names = self.names if name == BROKER else [name]
        await asyncio.gather(*(self._start(fleet, each) for each in names))

    async def _start(self, fleet: LocalFleet, name: str) -> None:
        at = self.names.index(name)
        routes = [f"nats-route://127.0.0.1:{port}" for port in self._routes]
        environment = {
            "NODE": name,
            "MQTT_LISTEN": f"127.0.0.1:{self.ports[at]}",
            "CLIENT_LISTEN": f"127.0.0.1:{self.plain_nats[at]}",
            "ROUTE_LISTEN": f"127.0.0.1:{self._routes[at]}",
            "ROUTES": json.dumps(routes),
            "STORE": str(self._folder / name),
        }
        command = (self._server, "-c", str(self._folder / "nats.conf"))
        await fleet.fleet.supervisor.start(name, command, environment=environment)
        await listening(fleet, name, self.ports[at])

    def throw_out(self, fleet: LocalFleet, name: str) -> None:
        """Take a member's rights away, as the documentation says."""
        path = self._folder / "users.conf"
        kept = path.read_text().split("  { user = ")
        path.write_text("  { user = ".join(part for part in kept if not part.startswith(f'"CN={name},')))
        for node in self.names:
            os.kill(fleet.fleet.supervisor.pid(node), signal.SIGHUP)

    def forget(self) -> None:
        """What the disks held is gone."""
        for name in self.names:
            shutil.rmtree(self._folder / name)
