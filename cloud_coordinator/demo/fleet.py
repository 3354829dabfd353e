"""The processes of a fleet whose files are laid out: started together, stopped from the leaves up."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

from fleetfed.cloud_coordinator.control.client import OperatorConfig
from fleetfed.cloud_coordinator.demo import layout
from fleetfed.cloud_coordinator.demo.layout import BROKER, COORDINATOR, HELPER, Folder
from fleetfed.cloud_coordinator.demo.processes import Supervisor
from fleetfed.cloud_coordinator.demo.topology import DevicePlace, GatewayPlace, Topology
from fleetfed.cloud_coordinator.keys.keyring import Keyring
from fleetfed.shared.mqtt.endpoint import Endpoint

_READY: Final = 30.0
"""Seconds for the broker to listen."""
_ENVIRONMENT: Final = {
    # One thread per process: fourteen processes that each start a pool would only wait for one another.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
}


class Fleet:
    """The processes of a fleet whose files are laid out.

    Args:
        folder: with everything in it.
        topology: who there is.
        broker: ``embedded`` or ``mosquitto``.
        helper: whether a second holder of mask seeds runs.
        metrics: whether everybody but the devices is to answer Prometheus, see `listens`.
    """

    def __init__(
        self, folder: Folder, topology: Topology, *, broker: str, helper: bool = False, metrics: bool = False
    ) -> None:
        self.folder = folder
        self.topology = topology
        self.supervisor = Supervisor(folder.logs)
        self._broker = broker
        self._helper = helper
        self.listens: dict[str, str] = {}
        if metrics:
            names = [COORDINATOR, *(place.id for place in topology.gateways)]
            names += [HELPER] if helper else []
            # Mosquitto has no such port.
            names += [BROKER] if broker == "embedded" else []
            self.listens = {name: f"{layout.HOST}:{layout.free_port()}" for name in names}

    async def start_broker(self, keyring: Keyring) -> int:
        """Start the broker with TLS and the access list; return its port once it listens."""
        if self._broker == "mosquitto":
            return await self._start_mosquitto(keyring)
        layout.write_broker(self.folder, keyring, listen=self.listens.get(BROKER, ""))
        command = (*_python("fleetfed.broker"), "run", "--config", str(self.folder.config(BROKER)))
        running = await self.supervisor.start(BROKER, command, environment=_ENVIRONMENT, pipe=True)
        line = await self.supervisor.wait_line(running, "listening on ", timeout=_READY)
        return int(line.rpartition(":")[2])

    async def _start_mosquitto(self, keyring: Keyring) -> int:
        from fleetfed.broker import mosquitto

        version = await asyncio.to_thread(mosquitto.probe)
        program = mosquitto.find_mosquitto()
        assert program is not None
        port = layout.free_port()
        config = layout.write_broker(self.folder, keyring, port=port)
        place = self.folder.role(BROKER)
        (place / "state").mkdir(exist_ok=True)
        (place / "mosquitto.conf").write_text(
            mosquitto.render_config(config, version=version, port=port, user=layout.user_if_root())
        )
        running = await self.supervisor.start(BROKER, (program, "-c", str(place / "mosquitto.conf")))
        async with asyncio.timeout(_READY):
            while True:
                if self.supervisor.failed.done():
                    raise self.supervisor.failed.result()
                try:
                    _, writer = await asyncio.open_connection(layout.HOST, port)
                except OSError:
                    # It says nothing when it is ready: asking is the only way to know.
                    await asyncio.sleep(0.02)
                    continue
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
                assert running.process.returncode is None
                return port

    async def start_roles(self) -> None:
        """Start everybody else, all at once."""
        starts = [self.start_role(name) for name in (COORDINATOR, *((HELPER,) if self._helper else ()))]
        starts += [self.start_role(place.id) for place in self.topology.gateways]
        starts += [self.start_role(place.id) for place in self.topology.devices]
        await asyncio.gather(*starts)

    async def start_role(self, name: str) -> None:
        """Start the coordinator, a gateway or a device."""
        path = self.folder.config(name)
        match path.stem:
            case "coordinator":
                command = (*_python("fleetfed.cloud_coordinator"), "coordinator", "run", "--config", str(path))
            case "helper":
                command = (*_python("fleetfed.cloud_coordinator.helper"), "run", "--config", str(path))
            case role:
                command = (*_python(f"fleetfed.{role}"), "run", "--config", str(path))
        await self.supervisor.start(name, command, environment=_ENVIRONMENT)

    async def stop(self) -> None:
        """Stop from the leaves up, so that nobody writes to somebody who is gone."""
        started = self.supervisor.names()
        levels: list[list[str]] = [[place.id for place in self.topology.devices]]
        for level in range(self.topology.tiers):
            levels.append([place.id for place in self.topology.gateways if place.level == level])
        for names in (*levels, [HELPER, COORDINATOR], [BROKER]):
            await self.supervisor.stop([name for name in names if name in started])

    def statuses(self, kind: str) -> dict[str, dict[str, Any]]:
        """What the ``devices`` or ``gateways`` last wrote about themselves."""
        places: tuple[DevicePlace | GatewayPlace, ...] = (
            self.topology.devices if kind == "devices" else self.topology.gateways
        )
        return {place.id: self.folder.status(place.id) for place in places}

    def operator(self, name: str, port: int, others: Sequence[str] = ()) -> OperatorConfig:
        """How an operator of this fleet connects."""
        return OperatorConfig(
            identity=self.folder.keys / "identities" / name,
            broker=Endpoint(host=layout.HOST, port=port, others=tuple(others)),
        )


def _python(module: str) -> tuple[str, ...]:
    # -P: a folder called `device` or `shared` where the user stands must not become a module of that name.
    return (sys.executable, "-P", "-m", module)


@contextlib.asynccontextmanager
async def stopping(fleet: Fleet) -> AsyncIterator[None]:
    """Stop the fleet however the body ends; a process that dies, or a signal, ends the body."""
    loop = asyncio.get_running_loop()
    body = asyncio.current_task()
    assert body is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, body.cancel)
    died = False

    def on_death(_: object) -> None:
        nonlocal died
        died = True
        body.cancel()

    fleet.supervisor.failed.add_done_callback(on_death)
    try:
        yield
    except asyncio.CancelledError:
        if not died:
            raise
        raise fleet.supervisor.failed.result() from None
    finally:
        fleet.supervisor.failed.remove_done_callback(on_death)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        await fleet.stop()
