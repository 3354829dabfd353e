"""A whole fleet (`setting`) in one process and on no clock but its own: coordinator, gateways, devices, brokers, and a
helper where updates have two seed holders.

The roles run as they are, with their databases, journals and files; what is simulated is what lies outside of them:
time, threads (`loop`), brokers and connections (`network`), power and kill -9 (`members`). The trainer moves one
coordinate per device by more than any clip, so the integers of a sum say who is in it, and how often.

A failure is:

- a coordinate of a sum that is neither 0 nor the limit; or one that is not 0 for whom the round's commits do not have,
  or 0 for whom they have;
- a device that was told "accepted" by a gateway whose part of the round is in the sum, but is not in it, unless the
  commit names it with a reason;
- a round that, once everything works again, does not end as committed, or as aborted with a reason; a number of a round
  or of a version that is given twice;
- two different messages where the protocol knows one, or a masked sum over too few (`ledger`);
- in split mode, a sum that differs in one bit from that of what its devices packed, a sum that is dropped as garbage,
  or a key on the disk of coordinator or gateway when its round is over;
- at the end, a device that is up and does not hold the coordinator's file byte for byte;
- a machine whose ``validate()`` does not hold, after any operation;
- a program that ends by itself, or an error that nobody handled;
- a damaged message that makes anything accepted, or changes a model or a stored answer;
- at the end, messages, half messages, tasks or subscriptions to chunks that are left over.

Not a failure:

- an accepted update that is in no version: its gateway did not reveal before the coordinator's expiry, the gateway
  below did not propose before its parent did, the round was aborted, or its device was revoked;
- an aborted round, where faults leave too few contributors;
- a round that is opened again and again while nobody answers;
- whatever a broker that lost its state had promised, until its clients have connected again.

Two runs of the same operations do the same, byte for byte, but for sealed boxes: libsodium takes the ephemeral half of
each from the system. Nothing is chosen by them.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import itertools
import random
import shutil
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy.random  # noqa: F401 - it binds a function of `secrets` as it is imported, which must not be a world's
from fleetfed_testing.cloud import write_model
from fleetfed_testing.signed_fleet import SignedFleet

from fleetfed.cloud_coordinator.config import CoordinatorConfig, ModelConfig, RoundSettings
from fleetfed.cloud_coordinator.helper.config import HelperConfig
from fleetfed.cloud_coordinator.state import State
from fleetfed.device.config import DeviceConfig, DeviceEndpoint, RunConfig
from fleetfed.gateway.config import GatewayConfig, UpstreamConfig
from fleetfed.shared.mqtt.endpoint import Endpoint
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.trust.identity import Identity
from fleetfed.shared.trust.keys import SigningKey
from fleetfed.shared.wire.envelope import MessageKind
from fleetfed.shared.wire.messages import Command, Request
from fleetfed.shared.wire.topics import BlobTopic, BroadcastTopic, Kind, MemberTopic, SiteTopics, Verb, parse
from tests.simulation import checks, ops
from tests.simulation.checks import Sum
from tests.simulation.ledger import Ledger
from tests.simulation.loop import START, VirtualLoop
from tests.simulation.members import (
    CoordinatorProcess,
    DeviceProcess,
    GatewayProcess,
    HelperProcess,
    SimulatedDeviceSession,
)
from tests.simulation.network import Message, Move, Network, SimulatedSession
from tests.simulation.patches import outside, watched
from tests.simulation.setting import PLAIN, SITES, Setting

CLOUD, WEST = 1, 2
"""Ports of the two brokers."""
DEADLINE, EXPIRES = 60_000, 120_000

_MEMORY = Path("/dev/shm")
_PATIENCE = 3_600_000
"""Milliseconds of trouble-free time after which nothing may be open."""
_SIGNED = frozenset({Verb.UPDATE, Verb.DECLINE, Verb.PROPOSE, Verb.REVEAL, Verb.RECEIPT, Verb.COMMIT, Verb.MASKS})


class _Fleet(SignedFleet):
    """One for all worlds: making certificates costs more than a small round."""

    def __init__(self) -> None:
        super().__init__(authority=SigningKey.from_seed(hashlib.sha256(b"authority").digest()))

    def identity(self, name: str, role: Role, site: str) -> Identity:
        """The same in every run of the tests."""
        key = SigningKey.from_seed(hashlib.sha256(name.encode()).digest())
        with mock.patch.object(SigningKey, "generate", return_value=key):
            return super().identity(name, role, site)

    def forget_signers(self) -> None:
        """They count what they sign, and keep the source of randomness that they began with."""
        self._signers.clear()


@functools.cache
def _fleet() -> _Fleet:
    return _Fleet()


class World:
    """See the module. Use it as a context manager, `run` operations, `finish`.

    Args:
        setting: which fleet.
    """

    def __init__(self, setting: Setting = PLAIN) -> None:
        self.setting = setting
        self.fleet = _fleet()
        self.fleet.forget_signers()
        self.loop = VirtualLoop()
        self.ledger = Ledger(setting)
        self.network = Network(self.ledger.heard)
        self.sums: dict[int, Sum] = {}
        self.revoked: list[str] = []
        self._random = itertools.count(1)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> World:
        try:
            self._patch()
            self.root = Path(tempfile.mkdtemp(prefix="fleet-", dir=_MEMORY if _MEMORY.is_dir() else None))
            self._stack.callback(shutil.rmtree, self.root, ignore_errors=True)
            self._make_members()
            for name in self.members:
                self.members[name].start()
                self.settle()
            return self
        except BaseException:
            self._stack.close()
            raise

    def __exit__(self, kind: object, *_: object) -> None:
        # After a failure its own story counts, and not what is broken because of it.
        with contextlib.suppress(*([Exception] if kind else [])), self._stack, contextlib.closing(self.loop):
            for member in self.members.values():
                if member.alive:
                    member.crash()
            self.loop.settle()

    def _patch(self) -> None:
        """Put the simulation in the place of what is outside of the roles."""
        SimulatedSession.network = SimulatedDeviceSession.network = self.network
        for whose, name, value in (*outside(self.loop, self.randomness), *watched(self)):
            self._stack.enter_context(mock.patch.object(whose, name, value))

    def randomness(self, size: int) -> bytes:
        """What the system would return, the same in every run."""
        return hashlib.shake_128(next(self._random).to_bytes(8, "big")).digest(size)

    def _make_members(self) -> None:
        fleet, root, loop = self.fleet, self.root, self.loop
        cloud, west = (Endpoint(host="localhost", port=port, tls=False) for port in (CLOUD, WEST))
        fleet.identity("c-main", Role.COORDINATOR, "_").save(root / "c-main")
        rounds = RoundSettings(deadline=DEADLINE / 1000, expires=EXPIRES / 1000, weight_cap=50, **self.setting.rounds)
        config = CoordinatorConfig(
            identity=root / "c-main",
            state=root / "c-main" / "state",
            broker=cloud,
            model=ModelConfig(file=write_model(root / "model")),
            rounds=rounds,
        )
        self.coordinator = CoordinatorProcess("c-main", loop, self.network, config)
        self.gateways = {
            name: GatewayProcess(
                name,
                loop,
                self.network,
                GatewayConfig(identity=root / name, state=root / name / "state", broker=broker, upstream=upstream),
                fleet.identity(name, Role.GATEWAY, SITES[name]),
            )
            for name, broker, upstream in (
                ("g-1", west, UpstreamConfig(broker=cloud)),
                ("g-2", west, UpstreamConfig(site="s-1")),
                ("g-3", cloud, UpstreamConfig()),
            )
        }
        self.devices = {}
        for name, site in self.setting.devices.items():
            port = CLOUD if site == "s-3" else WEST
            settings = DeviceConfig(
                identity=root / name / name,
                state=root / name / "state",
                broker=DeviceEndpoint(host="localhost", port=port, tls=False),
                run=RunConfig(seed=1),
            )
            identity = fleet.identity(name, Role.DEVICE, site)
            self.devices[name] = DeviceProcess(name, loop, self.network, settings, identity)
        self.members: dict[str, Any] = {"c-main": self.coordinator, **self.gateways, **self.devices}
        self.helper: HelperProcess | None = None
        if self.setting.helper:
            folder = HelperConfig(identity=root / "h-main", state=root / "h-main" / "state", broker=cloud)
            identity = fleet.identity("h-main", Role.HELPER, "_")
            self.helper = self.members["h-main"] = HelperProcess("h-main", loop, self.network, folder, identity)

    # --- Time and messages --------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Let all run that can run now."""
        self.loop.settle()
        for device in self.devices.values():
            device.turn()
        for member in self.members.values():
            member.check()
        for error in self.loop.errors:
            raise error.get("exception") or AssertionError(str(error))

    def moves(self) -> list[Move]:
        """All that could happen next."""
        return [*self.network.moves(), *((self.loop.perform, job) for job in self.loop.pending_jobs())]

    def deliver(self, count: int, rng: random.Random) -> bool:
        """Let ``count`` waiting things happen; returns whether there were so many."""
        for _ in range(count):
            moves = self.moves()
            if not moves:
                return False
            act, *arguments = rng.choice(moves)
            act(*arguments)
            self.settle()
        return True

    def deliver_all(self, rng: random.Random) -> None:
        """Let everything happen that needs no time."""
        for _ in range(200):
            if not self.deliver(100, rng):
                return
        raise AssertionError("messages never end")

    def next_event(self) -> int | None:
        """When something happens by itself."""
        times = [self.loop.next_timer, *(device.next_deadline() for device in self.devices.values())]
        return min((at for at in times if at is not None), default=None)

    def pass_time(self, milliseconds: int) -> None:
        """Time passes; timers fire."""
        end = self.loop.now + milliseconds
        for _ in range(100_000):
            at = self.next_event()
            if at is None or at > end:
                break
            self.loop.now = max(self.loop.now, at)
            for device in self.devices.values():
                device.timer()
            self.settle()
        else:
            raise AssertionError("timers never end")
        self.loop.now = end
        self.settle()

    # --- Operations ---------------------------------------------------------------------------------------------------

    def run(self, operations: Iterable[ops.Op]) -> None:
        """Run operations in order."""
        for operation in operations:
            self._do(operation)
            self.settle()

    def _do(self, operation: ops.Op) -> None:
        match operation:
            case ops.AdvanceTime(milliseconds):
                self.pass_time(milliseconds)
            case ops.StartRound(rounds):
                self.ask(Command.ROUND_START, rounds=rounds)
            case ops.AbortRound():
                self.ask(Command.ROUND_ABORT)
            case ops.RevokeDevice(device):
                self._revoke(f"d-{device}")
            case ops.DeviceTrains(device):
                self.devices[f"d-{device}"].train()
            case ops.Deliver(count, seed):
                self.deliver(count, random.Random(seed))
            case ops.DeliverAll(seed):
                self.deliver_all(random.Random(seed))
            case _:
                self._break(operation)

    def _break(self, operation: ops.Op) -> None:
        match operation:
            case ops.DropConnection(member):
                for link in self.network.links(member):
                    self.network.drop(link)
            case ops.CrashDevice(device, step, lossy):
                if self.devices[f"d-{device}"].alive:
                    self.devices[f"d-{device}"].cut_power(step, lossy=lossy)
            case ops.CrashGateway(gateway, after):
                if self.gateways[f"g-{gateway}"].alive:
                    self.gateways[f"g-{gateway}"].crash(write=after is ops.After.WRITE)
            case ops.CrashCoordinator(after):
                if self.coordinator.alive:
                    self.coordinator.crash(write=after is ops.After.WRITE)
            case ops.CrashHelper(after):
                if self.helper is not None and self.helper.alive:
                    self.helper.crash(write=after is ops.After.WRITE)
            case ops.Restart(member):
                self.start(member)
            case ops.WakeDevice(device):
                self.start(f"d-{device}")
            case ops.SleepDevice(device):
                if self.devices[f"d-{device}"].alive:
                    self.devices[f"d-{device}"].sleep()
            case ops.BrokerCrash(broker, lose):
                self.network.broker((CLOUD, WEST)[broker]).crash(lose=lose)
            case ops.PartitionSite(gateway):
                self._partition(f"g-{gateway}")
            case ops.Heal():
                self.network.cut.clear()
            case ops.Duplicate(member, which):
                self._duplicate(member, which)
            case ops.ReplayOld(which):
                if self.ledger.history:
                    port, message = self.ledger.history[which % len(self.ledger.history)]
                    self.network.broker(port).spread(message)
            case ops.Corrupt(which, byte, flip):
                self._corrupt(which, byte, flip)
            case _:
                raise AssertionError(operation)

    def start(self, member: str) -> None:
        """Start whoever is not up."""
        if not self.members[member].alive:
            self.members[member].start()

    def _partition(self, gateway: str) -> None:
        port = WEST if gateway == "g-2" else CLOUD
        self.network.cut.add((gateway, port))
        for link in self.network.links(gateway):
            if link.client.config.port == port:
                self.network.drop(link)

    def _duplicate(self, member: str, which: int) -> None:
        for link in self.network.links(member):
            last = list(link.session.last.values())
            if last:
                message = last[which % len(last)]
                link.session.lanes.setdefault((message.publisher, message.topic), deque()).appendleft(message)

    def _corrupt(self, which: int, byte: int, flip: int) -> None:
        """Replay a signed message with one byte changed, alone on the wire; nothing of it may be believed."""
        signed = [each for each in self.ledger.history if each[1].payload and _is_signed(each[1].topic)]
        if not signed:
            return
        self.deliver_all(random.Random(0))
        port, message = signed[which % len(signed)]
        damaged = bytearray(message.payload)
        damaged[byte % len(damaged)] ^= flip
        before = self.facts()
        self.network.broker(port).spread(replace(message, payload=bytes(damaged)))
        self.deliver_all(random.Random(0))
        assert self.facts() == before, f"a damaged message on {message.topic} was believed"

    def facts(self) -> Any:
        """All that a damaged message must not change."""
        gateways = {
            name: sorted(update.message_id for update in each.machine.round.record.accepted.values())
            for name, each in self.gateways.items()
            if each.alive and each.machine.round is not None
        }
        devices = {
            name: (each.machine.sync.models, each.machine.sync.floor, each.machine.answer)  # type: ignore[attr-defined]
            for name, each in self.devices.items()
            if each.alive
        }
        versions = (
            [each.sha256 for each in self.coordinator.coordinator.store.versions(limit=100)]
            if self.coordinator.alive
            else []
        )
        return gateways, devices, versions

    # --- The operator -------------------------------------------------------------------------------------------------

    def ask(self, command: Command, **arguments: Any) -> bytes:
        """Publish a signed command; returns its message id."""
        signer = self.fleet.signer("op", Role.OPERATOR, "_")
        body = Request(command=command, arguments=arguments)
        message = signer.sign(MessageKind.REQUEST, body, now=self.loop.now, lifetime=86_000_000)
        topic = SiteTopics(self.fleet.name, "_").up(Kind.OPERATOR, "op", Verb.REQUEST)
        self.network.broker(CLOUD).publish(Message("op", topic, message.encode()), retain=False)
        return message.id

    def _revoke(self, device: str) -> None:
        if device in self.revoked or len(self.revoked) == 2:
            return
        self.revoked.append(device)
        serials = tuple(sorted(self.devices[each].identity.certificate.serial for each in self.revoked))
        self.fleet.now = self.loop.now
        message = self.fleet.revocations(len(self.revoked), serials)
        self.ask(Command.KEYS_REVOKE, revocations=message)

    # --- The end ------------------------------------------------------------------------------------------------------

    def finish(self, seed: int = 0) -> None:
        """Heal everything and let time pass until nothing is left to do; then check what must hold.

        Raises:
            AssertionError: see the module.
        """
        rng = random.Random(seed)
        self.network.cut.clear()
        for member in self.members:
            self.start(member)
            self.settle()
        end = self.loop.now + _PATIENCE
        while True:
            self._work(rng)
            if self._at_rest():
                break
            at = self.next_event()
            assert at is not None, f"nothing happens any more: {self.describe()}"
            assert at < end, f"no end: {self.describe()}"
            self.pass_time(max(1, at - self.loop.now))
        # Whoever was not served in time is by now: nothing retries for longer than this.
        self.pass_time(2 * EXPIRES)
        self._work(rng)
        checks.check(self)

    def _work(self, rng: random.Random) -> None:
        while True:
            self.deliver_all(rng)
            busy = [device for device in self.devices.values() if device.alive and device.worker.job is not None]
            if not busy:
                break
            for device in busy:
                device.train()
                self.settle()
        for name, device in self.devices.items():
            # A power cut that was waiting for its moment.
            if not device.alive:
                self.start(name)
                self.settle()
                self._work(rng)

    def _at_rest(self) -> bool:
        resting = self.coordinator.machine.state in (State.IDLE, State.PAUSED, State.FINISHED)
        return resting and not self._behind()

    def _behind(self) -> list[str]:
        newest = self.coordinator.coordinator.newest()
        behind = []
        for name, device in self.devices.items():
            models = device.machine.sync.models  # type: ignore[attr-defined]
            if name not in self.revoked and (not models or models[0].sha256 != newest.sha256):
                behind.append(name)
        return behind

    def describe(self) -> str:
        """Where everybody stands."""
        states = {name: str(each.machine.state) if each.alive else "dead" for name, each in self.members.items()}
        return f"{states}, behind: {self._behind()}, at {self.loop.now - START} ms"


def _is_signed(topic: str) -> bool:
    match parse(topic):
        case MemberTopic(verb=verb):
            return verb in _SIGNED
        case BroadcastTopic(what=what):
            return what in ("model", "plan", "revoked")
        case BlobTopic():
            return True
    return False


@contextlib.contextmanager
def world(setting: Setting = PLAIN) -> Iterator[World]:
    """A fleet that is up, connected and has the first model."""
    before = asyncio.get_event_loop_policy()
    with World(setting) as made:
        made.deliver_all(random.Random(0))
        made.pass_time(1_000)
        made.deliver_all(random.Random(0))
        yield made
    assert asyncio.get_event_loop_policy() is before


def simulate(operations: Iterable[ops.Op], *, seed: int = 0, setting: Setting = PLAIN) -> None:
    """Run operations on a new fleet, heal it, and check everything."""
    with world(setting) as made:
        made.run(operations)
        made.finish(seed)
