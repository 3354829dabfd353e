"""Mosquitto in the embedded broker's place: its configuration, and a supervised process of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from fleetfed.broker.config import BrokerConfig
from fleetfed.shared.errors import ConfigError

_VERSION: Final = re.compile(r"mosquitto version (\d+)\.(\d+)\.(\d+)")
_START_SECONDS: Final = 15.0
_STOP_SECONDS: Final = 10.0
_TAIL: Final = 2000
_AUTOSAVE: Final = 2
"""Seconds between two writes of the whole database.

On every change would be safer by those seconds and cost the square of what is queued: a thousand devices that send
100 KB at once then got 19 updates per second through, in place of 200. What a broker forgets when it is killed is said
again: by `fleetfed.shared.mqtt.unsaved` what it retained, by whoever has no receipt the rest.
"""
_PLUGIN_FOLDERS: Final = ("lib", "lib/*", "lib/*/mosquitto")
_EXTRA_PATH: Final = "/usr/local/sbin:/usr/sbin:/sbin"
"""Where distributions put the daemon, outside of a user's PATH."""


def find_mosquitto() -> str | None:
    """The path of the mosquitto program, or ``None`` if it is not installed."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path=_EXTRA_PATH)


def find_acl_plugin() -> Path | None:
    """Where the ACL plugin of Mosquitto 2.1 and newer is installed, or ``None``; first where the program is."""
    program = find_mosquitto()
    beside = [] if program is None else [Path(program).absolute().parents[1]]
    for prefix in (*beside, Path("/usr"), Path("/usr/local")):
        for folder in _PLUGIN_FOLDERS:
            for path in sorted(prefix.glob(f"{folder}/mosquitto_acl_file.so")):
                return path
    return None


def probe(program: str | None = None) -> tuple[int, int, int]:
    """The version of the installed Mosquitto.

    Raises:
        ConfigError: it is not installed, or does not say its version.
    """
    program = program or find_mosquitto()
    if program is None:
        raise ConfigError("mosquitto is not installed: install the package `mosquitto`, or use the embedded broker")
    # `mosquitto -h` exits with 3 in some versions and 0 in others; only its text counts.
    result = subprocess.run([program, "-h"], capture_output=True, text=True, timeout=10, check=False)
    match = _VERSION.search(result.stdout + result.stderr)
    if match is None:
        raise ConfigError(f"{program} does not say its version")
    return int(match[1]), int(match[2]), int(match[3])


def render_config(
    config: BrokerConfig,
    *,
    version: tuple[int, ...] = (2, 0, 11),
    acl_file: Path | None = None,
    port: int | None = None,
    plain_port: int | None = None,
    user: str | None = None,
    nodelay: bool = True,
    log_file: Path | None = None,
) -> str:
    """The text of ``mosquitto.conf``.

    Args:
        config: what the embedded broker would be started with.
        version: the Mosquitto that will read it.
        acl_file: instead of the configuration's.
        port: instead of the configuration's, which Mosquitto cannot take as 0.
        plain_port: the same for the second listener.
        user: account to run as when it is started by root; without it Mosquitto changes to ``mosquitto``.
        nodelay: send small packets at once; without it (Mosquitto's default) an answer may wait 40 ms for another
            packet to share a segment with.
        log_file: where to log; without it to standard error.
    """
    limits = config.limits
    acl_file = acl_file or config.acl_file
    plain = config.tls is None or config.plain_port is not None
    lines = [
        "# Rendered; do not edit. SIGHUP makes Mosquitto read the ACL, certificates and revocation list again.",
        # A TLS client always has a name, its certificate's: this concerns a plain loopback listener only.
        f"allow_anonymous {_word(plain)}",
        f"log_dest {f'file {log_file}' if log_file is not None else 'stderr'}",
        "log_type error",
        "log_type warning",
        "log_type notice",
        "connection_messages false",
        f"sys_interval {round(config.sys_interval)}",
        f"max_packet_size {limits.max_packet}",
        f"max_inflight_messages {limits.max_inflight}",
        f"max_queued_messages {limits.max_queued_messages}",
        f"max_queued_bytes {limits.max_queued_bytes}",
        f"max_keepalive {limits.max_keepalive}",
        # Seconds are not a unit of this setting.
        f"persistent_client_expiration {max(1, round(limits.max_session_expiry / 3600))}h",
        f"set_tcp_nodelay {_word(nodelay)}",
    ]
    if user is not None:
        lines.append(f"user {user}")
    if acl_file is not None:
        # 2.1 moved the same code into a plugin and deprecates the option, which 3.0 will not have any more.
        plugin = find_acl_plugin() if version >= (2, 1) else None
        if plugin is not None:
            lines += [f"global_plugin {plugin}", f"plugin_opt_acl_file {acl_file}"]
        else:
            lines.append(f"acl_file {acl_file}")
    if config.persistence_dir is not None:
        # The default interval is 1800 s, and all since then is lost when the process is killed.
        lines += [
            "persistence true",
            f"persistence_location {config.persistence_dir.absolute()}/",
            "autosave_on_changes false",
            f"autosave_interval {_AUTOSAVE}",
        ]
    else:
        lines.append("persistence false")
    lines += ["", f"listener {config.port if port is None else port} {config.host}"]
    lines.append(f"max_connections {limits.max_connections}")
    if config.tls is not None:
        lines += [
            f"cafile {config.tls.ca}",
            f"certfile {config.tls.cert}",
            f"keyfile {config.tls.key}",
            "tls_version tlsv1.2",
            "require_certificate true",
            "use_identity_as_username true",
            # Without this one another valid device takes a session over, and its queued messages with it.
            "use_username_as_clientid true",
        ]
        if config.tls.crl is not None:
            lines.append(f"crlfile {config.tls.crl}")
    if config.plain_port is not None:
        lines += ["", f"listener {config.plain_port if plain_port is None else plain_port} 127.0.0.1"]
    return "\n".join(lines) + "\n"


def _word(value: bool) -> str:
    return "true" if value else "false"


class MosquittoProcess:
    """A Mosquitto that this process starts, watches and stops; used like `EmbeddedBroker`.

    Attributes:
        port: TCP port of the first listener, once started; the same after a restart.
        plain_port: port of the second, plain listener, if the configuration asks for one.
    """

    def __init__(self, config: BrokerConfig, directory: Path | None = None, *, nodelay: bool = True) -> None:
        """Prepare; nothing is started.

        Args:
            config: as for the embedded broker.
            directory: where the configuration and the log go; a temporary one by default.
            nodelay: as for `render_config`.
        """
        self._config = config
        self._nodelay = nodelay
        self._owned: tempfile.TemporaryDirectory[str] | None = None
        if directory is None:
            self._owned = tempfile.TemporaryDirectory(prefix="fleetfed-mosquitto-")
            directory = Path(self._owned.name)
        self._directory = directory
        self._process: asyncio.subprocess.Process | None = None
        self.port = config.port
        self.plain_port = config.plain_port

    @property
    def pid(self) -> int | None:
        """The process id while it runs."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def start(self) -> None:
        """Start it and wait until it listens.

        Raises:
            ConfigError: it is not installed, or it ends at once; the message has the end of its log.
        """
        program = find_mosquitto()
        version = await asyncio.to_thread(probe, program)
        assert program is not None
        self.port = self.port or _free_port(self._config.host)
        if self.plain_port is not None:
            self.plain_port = self.plain_port or _free_port("127.0.0.1")
        self._directory.mkdir(parents=True, exist_ok=True)
        if self._config.persistence_dir is not None:
            self._config.persistence_dir.mkdir(parents=True, exist_ok=True)
        conf = self._directory / "mosquitto.conf"
        conf.write_text(
            render_config(
                self._config,
                version=version,
                port=self.port,
                plain_port=self.plain_port,
                nodelay=self._nodelay,
                # Keys of this user must stay readable: a Mosquitto started by root would become `mosquitto`.
                user=pwd.getpwuid(os.geteuid()).pw_name if os.geteuid() == 0 else None,
            )
        )
        with (self._directory / "mosquitto.log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                program, "-c", str(conf), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environment()
            )
        await self._listening()

    async def _listening(self) -> None:
        assert self._process is not None
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _START_SECONDS
        while loop.time() < deadline:
            if self._process.returncode is not None:
                raise ConfigError(f"mosquitto ended with status {self._process.returncode}:\n{self.log_tail()}")
            try:
                _, writer = await asyncio.open_connection(self._config.host, self.port)
            except OSError:
                await asyncio.sleep(0.02)
                continue
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            # Somebody else may listen there, and then Mosquitto ends with "Address already in use".
            await asyncio.sleep(0.05)
            if self._process.returncode is None:
                return
        await self.kill()
        raise ConfigError(f"mosquitto does not listen on port {self.port}:\n{self.log_tail()}")

    async def stop(self) -> None:
        """Stop it gracefully; durable state is kept."""
        await self._end(signal.SIGTERM)
        if self._owned is not None:
            self._owned.cleanup()
            self._owned = None

    async def kill(self) -> None:
        """Kill it as a crash would; `start` may follow."""
        await self._end(signal.SIGKILL)

    async def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(how)
        try:
            await asyncio.wait_for(process.wait(), _STOP_SECONDS)
        except TimeoutError:
            process.kill()
            await process.wait()

    async def reload(self) -> None:
        """Have it read the ACL, certificates and revocation list again."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGHUP)

    def log_tail(self) -> str:
        """The end of its log."""
        try:
            data = (self._directory / "mosquitto.log").read_bytes()
        except OSError:
            return "(no log)"
        return data[-_TAIL:].decode(errors="replace").strip() or "(the log is empty)"

    def statistics(self) -> dict[str, int]:
        """What can be known from outside; everything else is in its ``$SYS`` topics."""
        pid = self.pid
        if pid is None:
            return {}
        try:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except OSError:
            return {}
        return {"rss_bytes": pages * os.sysconf("SC_PAGE_SIZE")}


def _environment() -> Mapping[str, str]:
    return {key: value for key, value in os.environ.items() if key in {"PATH", "HOME", "LANG", "TZ", "LD_LIBRARY_PATH"}}


def _free_port(host: str) -> int:
    family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, 0))
        port: int = sock.getsockname()[1]
        return port
