"""Real brokers on free ports: Mosquitto as a process, the embedded broker in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from fleetfed.cloud_coordinator.keys.pki import Listener, Pki, Role
from fleetfed.shared.mqtt.config import ConnectionConfig
from fleetfed.shared.mqtt.tls import TlsFiles
from fleetfed_testing.waiting import PATIENCE

MOSQUITTO = shutil.which("mosquitto", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


def free_port() -> int:
    """A port that nobody listens on just now, below those that the kernel gives to outgoing connections."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", port))
            return port


class FleetPki:
    """A fleet's authorities and its members' certificates, made when first asked for."""

    def __init__(self, directory: Path, fleet: str = "demo") -> None:
        self.directory = directory
        self.fleet = fleet
        self.authority = Pki.create(directory / "ca", fleet, now=datetime.now(UTC))
        self._known: dict[str, TlsFiles] = {}

    def server(self, name: str = "broker") -> TlsFiles:
        """The certificate of a broker on this machine."""
        if name not in self._known:
            self._known[name] = self.authority.issue_server(
                name, ["localhost", "127.0.0.1"], self.directory / name, now=datetime.now(UTC)
            )
        return self._known[name]

    def client(self, name: str, role: Role = Role.DEVICE) -> TlsFiles:
        """The certificate of a member."""
        if name not in self._known:
            self._known[name] = self.authority.issue_client(name, role, self.directory / name, now=datetime.now(UTC))
        return self._known[name]

    def bundle(self, listener: Listener = Listener.SITE) -> Path:
        """What a listener trusts."""
        return self.authority.bundle(listener)


class RunningBroker(Protocol):
    """What tests may rely on, whichever broker it is."""

    kind: str
    port: int
    pki: FleetPki
    tls: bool

    def stop(self) -> None:
        """End in good order."""

    def restart(self) -> None:
        """Stop, then listen on the same port again."""

    def config(self, name: str, role: Role = Role.DEVICE, **changes: Any) -> ConnectionConfig:
        """How ``name`` connects to it."""


def _config(broker: RunningBroker, name: str, role: Role, changes: dict[str, Any]) -> ConnectionConfig:
    files = broker.pki.client(name, role) if broker.tls else None
    settings: dict[str, Any] = {"port": broker.port, "tls": files, "reconnect_cap": 0.2, **changes}
    return ConnectionConfig(host="127.0.0.1", client_id=name, **settings)


class Mosquitto:
    """A Mosquitto process with mutual TLS, or plain; `kill` is a power cut.

    With ``durable`` it writes its state after every change, which costs some milliseconds per message.
    """

    kind = "mosquitto"

    def __init__(
        self,
        directory: Path,
        pki: FleetPki,
        *,
        tls: bool = True,
        acl: str | None = None,
        durable: bool = False,
        extra: str = "",
    ) -> None:
        assert MOSQUITTO is not None
        self.directory = directory
        self.pki = pki
        self.tls = tls
        self.port = free_port()
        self.acl_file = directory / "acl"
        directory.mkdir(parents=True, exist_ok=True)
        lines = [
            f"listener {self.port} 127.0.0.1",
            "user root",
            "max_inflight_messages 20",
            "max_queued_messages 20000",
            "max_packet_size 262144",
            "set_tcp_nodelay true",
        ]
        if durable:
            lines += ["persistence true", f"persistence_location {directory}/", "autosave_on_changes true"]
            lines.append("autosave_interval 1")
        if tls:
            server = pki.server()
            lines += [
                f"cafile {pki.bundle()}",
                f"certfile {server.cert}",
                f"keyfile {server.key}",
                "require_certificate true",
                "use_identity_as_username true",
                "use_username_as_clientid true",
                "allow_anonymous false",
            ]
        else:
            lines.append("allow_anonymous true")
        if acl is not None:
            self.acl_file.write_text(acl)
            self.acl_file.chmod(0o600)
            lines.append(f"acl_file {self.acl_file}")
        (directory / "mosquitto.conf").write_text("\n".join([*lines, extra]) + "\n")
        self._log = directory / "mosquitto.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Listen; returns when it does."""
        assert MOSQUITTO is not None
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [MOSQUITTO, "-c", str(self.directory / "mosquitto.conf")], stdout=log, stderr=log
            )
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            assert self._process.poll() is None, self.log()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.01)
        raise AssertionError(f"mosquitto does not listen:\n{self.log()}")

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self._end(signal.SIGKILL)

    def freeze(self) -> None:
        """Stop answering without closing anything."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Go on after `freeze`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def reload(self) -> None:
        """Read the ACL again."""
        assert self._process is not None
        self._process.send_signal(signal.SIGHUP)

    def restart(self) -> None:
        self.stop()
        self.start()

    def log(self) -> str:
        """All that it logged."""
        return self._log.read_text(errors="replace")

    def config(self, name: str, role: Role = Role.DEVICE, **changes: Any) -> ConnectionConfig:
        return _config(self, name, role, changes)

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None:
            if how is not signal.SIGKILL:
                # A frozen process gets this one only once it goes on, and must not go on before it is killed.
                self._process.send_signal(signal.SIGCONT)
            self._process.send_signal(how)
            self._process.wait(PATIENCE)
            self._process = None


class Embedded:
    """The embedded broker on an event loop of its own, in a thread."""

    kind = "embedded"

    def __init__(
        self, directory: Path, pki: FleetPki, *, tls: bool = True, acl: str | None = None, **settings: Any
    ) -> None:
        self.directory = directory
        self.pki = pki
        self.tls = tls
        self.port = free_port()
        self.acl_file = directory / "acl"
        self._settings = settings
        directory.mkdir(parents=True, exist_ok=True)
        if acl is not None:
            self.acl_file.write_text(acl)
            self._settings["acl_file"] = self.acl_file
        self.start()

    def start(self) -> None:
        """Listen; returns when it does."""
        from fleetfed.broker.config import BrokerConfig
        from fleetfed.broker.embedded import EmbeddedBroker
        from fleetfed.shared.mqtt.tls import TlsFiles as BrokerTlsFiles

        files = None
        if self.tls:
            server = self.pki.server()
            files = BrokerTlsFiles(self.pki.bundle(), server.cert, server.key)
        self.broker = EmbeddedBroker(BrokerConfig(host="127.0.0.1", port=self.port, tls=files, **self._settings))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="embedded-broker", daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self.broker.start(), self._loop).result(PATIENCE)

    def stop(self) -> None:
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self.broker.stop(), self._loop).result(PATIENCE)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(PATIENCE)
            self._loop.close()

    def restart(self) -> None:
        self.stop()
        self.start()

    def config(self, name: str, role: Role = Role.DEVICE, **changes: Any) -> ConnectionConfig:
        return _config(self, name, role, changes)
