"""A helper on a real broker: its key, its answers, and what a kill leaves of them."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fleetfed_testing.helper_round import HelperRound
from fleetfed_testing.signed_fleet import SignedFleet
from fleetfed_testing.trust_repository import Owners
from fleetfed_testing.waiting import PATIENCE, eventually

from fleetfed.cloud_coordinator.helper import cli
from fleetfed.cloud_coordinator.helper.config import HelperConfig, load
from fleetfed.cloud_coordinator.helper.runtime import Helper
from fleetfed.cloud_coordinator.helper.store import Store
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.errors import ConfigError, RejectReason
from fleetfed.shared.mqtt.config import ConnectionConfig
from fleetfed.shared.mqtt.session import Session
from fleetfed.shared.secure import split
from fleetfed.shared.secure.box import Reader
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.trust.identity import Identity
from fleetfed.shared.trust.policy import Policy
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.chunks import Assembler
from fleetfed.shared.wire.chunks import split as cut
from fleetfed.shared.wire.envelope import Head, MessageKind, open_body
from fleetfed.shared.wire.masking import MaskRequest, MaskSums, SealKey
from fleetfed.shared.wire.messages import Life, Presence
from fleetfed.shared.wire.topics import Broadcast, Kind, SiteTopics, Verb

CLOUD = SiteTopics("demo", "_")
NAME = "h-main"
DEVICES = ("d-1", "d-2", "d-3", "d-4")
SHORT = 'identity = "identity"\nstate = "state"\n[broker]\nhost = "127.0.0.1"\nport = {port}\ntls = false\n'


class Coordinator:
    """Asks, and hears; a script that signs for real."""

    def __init__(self, port: int, fleet: SignedFleet) -> None:
        self.fleet = fleet
        self.heard: dict[str, list[bytes]] = {}
        config = ConnectionConfig(host="127.0.0.1", port=port, client_id="c-main", reconnect_cap=0.1)
        self.session = Session(config, subscriptions=[f"{CLOUD.root}/h/+/up/+"], on_message=self._take)

    async def _take(self, topic: str, payload: bytes, retained: bool) -> None:
        self.heard.setdefault(topic, []).append(payload)

    async def hears(self, verb: Verb, count: int = 1) -> list[bytes]:
        topic = CLOUD.up(Kind.HELPER, NAME, verb)
        await eventually(lambda: len(self.heard.get(topic, [])) >= count)
        return self.heard[topic]

    async def sees(self, life: Life) -> None:
        """Wait until this is the helper's last word, or the broker's, on its presence."""
        heard = self.heard.setdefault(CLOUD.up(Kind.HELPER, NAME, Verb.STATE), [])
        await eventually(lambda: heard and codec.decode(Presence, heard[-1], limit=500).life is life)

    async def key(self) -> bytes:
        """The helper's signed key, verified."""
        raw = (await self.hears(Verb.KEY))[-1]
        verifier = self.fleet.identity("c-main", Role.COORDINATOR, "_").verifier()
        verifier.open(raw, SealKey, kind=MessageKind.SEAL_KEY, now=self.fleet.now, sender=NAME)
        return raw

    async def ask(self, rnd: HelperRound, request: MaskRequest) -> None:
        message = rnd.signed(request)
        for frame in cut(message.id, message.encode()):
            await self.session.publish(CLOUD.down(Kind.HELPER, NAME, Verb.ASK), frame)

    async def answers(self, count: int, *, until: RejectReason | None = None) -> list[tuple[Head, MaskSums]]:
        """So many whole answers at least, and one with the reason ``until``, verified."""
        found: list[tuple[Head, MaskSums]] = []

        def complete() -> bool:
            found.clear()
            assembler = Assembler(lambda head: None)
            for frame in self.heard.get(CLOUD.up(Kind.HELPER, NAME, Verb.MASKS), []):
                done = assembler.feed(frame)
                if done is not None:
                    raw = open_body(done[0].header, done[1])
                    found.append((done[0], codec.decode(MaskSums, raw, limit=len(raw))))
            return len(found) >= count and (until is None or until in {sums.reason for _, sums in found})

        await eventually(complete)
        verifier = self.fleet.identity("c-main", Role.COORDINATOR, "_").verifier()
        for head, _ in found:
            verifier.head(head, kind=MessageKind.MASK_SUMS, now=self.fleet.now, sender=NAME)
        return found


@pytest.fixture
async def world(embedded_broker: Callable[..., Any], tmp_path: Path) -> AsyncIterator[tuple[Coordinator, Path]]:
    broker = embedded_broker(tls=False)
    fleet = SignedFleet(now=unix_ms())
    fleet.identity(NAME, Role.HELPER, "_").save(tmp_path / "identity")
    (tmp_path / "helper.toml").write_text(SHORT.format(port=broker.port))
    coordinator = Coordinator(broker.port, fleet)
    task = asyncio.create_task(coordinator.session.run())
    await coordinator.session.wait_connected()
    yield coordinator, tmp_path / "helper.toml"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def running(config: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    command = (sys.executable, "-m", "fleetfed.cloud_coordinator.helper", "run", "--config", str(config))
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def with_key(fleet: SignedFleet, config: Path, key: bytes, **changes: Any) -> HelperRound:
    """A round whose plan names this key of the helper's, and whose devices seal to it."""
    store = Store(config.parent / "state" / "helper.db")
    fleet._seals[NAME] = store.secret(next(own.public for own in list(store.keys()) if own.message == key))
    store.close()
    rnd = HelperRound.of(fleet, helper=key, **changes)
    rnd.add(*DEVICES)
    return rnd


def expected(fleet: SignedFleet, rnd: HelperRound, devices: tuple[str, ...]) -> bytes:
    words = fleet.ring.layout.zeros()
    for name in devices:
        head = rnd.updates[name].head
        seed = split.open_seed(head, Reader.HELPER, fleet.seal(NAME))
        split.add_masks(words, [split.mask_key(seed, split.binding_of(head))])
    return bytes(words.astype("<u8").tobytes())


async def test_killed_twice_it_gives_one_answer(world: tuple[Coordinator, Path]) -> None:
    coordinator, config = world
    fleet = coordinator.fleet
    async with running(config) as first:
        key = await coordinator.key()
        rnd = with_key(fleet, config, key)
        request = rnd.request(DEVICES[:3])
        await coordinator.ask(rnd, request)
        ((_, sums),) = await coordinator.answers(1)
        assert (sums.plan, sums.gateway, sums.reason) == (rnd.hash, "g-north", None)
        assert sums.sums == (expected(fleet, rnd, DEVICES[:3]),)
        first.send_signal(signal.SIGKILL)
        await first.wait()
    await coordinator.sees(Life.LOST)

    async with running(config) as second:
        await coordinator.hears(Verb.KEY, 2)
        # The same request in a new message: the same bytes. Another: a conflict.
        await coordinator.ask(rnd, request)
        await coordinator.ask(rnd, rnd.request(DEVICES[1:]))
        # The broker may deliver the first request again too: whoever was killed had perhaps not confirmed it.
        *same, (_, conflict) = await coordinator.answers(3, until=RejectReason.CONFLICT)
        assert len({head.encode() for head, _ in same}) == 1
        assert [answer.sums for _, answer in same] == [sums.sums] * len(same)
        assert (conflict.sums, conflict.reason) == ((), RejectReason.CONFLICT)
        second.send_signal(signal.SIGKILL)
        await second.wait()

    # What the second said is here; the next key is the third's.
    await coordinator.sees(Life.LOST)
    keys = coordinator.heard[CLOUD.up(Kind.HELPER, NAME, Verb.KEY)]
    said = len(keys)
    async with running(config) as third:
        await coordinator.hears(Verb.KEY, said + 1)
        assert len(set(keys)) == 1
        third.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(third.wait(), PATIENCE) == 0
    await coordinator.sees(Life.DISCONNECTED)


@asynccontextmanager
async def inside(config: Path, clock: Callable[[], int] = unix_ms, **changes: Any) -> AsyncIterator[Helper]:
    """A helper on this loop."""
    settings: HelperConfig = replace(load(config), **changes)
    helper = Helper(settings, Identity.load(settings.identity), clock=clock)
    task = asyncio.create_task(helper.run())
    try:
        yield helper
    finally:
        helper.stop()
        await task


async def test_a_refusal_says_why_and_changes_nothing(
    world: tuple[Coordinator, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    coordinator, config = world
    async with inside(config) as helper:
        rnd = with_key(coordinator.fleet, config, await coordinator.key())
        await coordinator.ask(rnd, rnd.request(("d-1",)))
        ((_, refusal),) = await coordinator.answers(1)
        assert (refusal.sums, refusal.reason, refusal.gateway) == ((), RejectReason.BELOW_MINIMUM, "g-north")
        assert helper.counters.snapshot() == {"below_minimum": 1}
        assert helper.store.claims() == []
        # A refusal is no answer: the right request still gets its masks.
        await coordinator.ask(rnd, rnd.request())
        assert (await coordinator.answers(2))[1][1].sums == (expected(coordinator.fleet, rnd, DEVICES),)
    assert cli.main(["status", "--config", str(config), "--json"]) == cli.OK
    status = json.loads(capsys.readouterr().out)
    assert (status["role"], status["answered"], status["round"], status["keys"]) == ("helper", 1, 1, 1)
    assert status["rejected"] == {"below_minimum": 1}
    assert cli.main(["status", "--config", str(config)]) == cli.OK
    assert "below_minimum 1" in capsys.readouterr().out


async def test_a_coordinator_that_begins_to_listen_hears_again_what_was_retained(
    world: tuple[Coordinator, Path],
) -> None:
    """Not every broker hands that out to who listens with a wildcard."""
    coordinator, config = world
    async with inside(config):
        await coordinator.key()
        await coordinator.sees(Life.READY)
        states = CLOUD.up(Kind.HELPER, NAME, Verb.STATE)
        keys, said = len(await coordinator.hears(Verb.KEY)), len(coordinator.heard[states])
        own = coordinator.fleet.identity(NAME, Role.HELPER, "_").certificate
        assert codec.decode(Presence, coordinator.heard[states][-1], limit=500).serial == own.serial
        birth = codec.encode(Presence(life=Life.READY, session=7, since=unix_ms()))
        await coordinator.session.publish(CLOUD.broadcast(Broadcast.NODE), birth)
        await coordinator.hears(Verb.KEY, keys + 1)
        await coordinator.hears(Verb.STATE, said + 1)


async def test_revocations_are_heard_and_kept(world: tuple[Coordinator, Path]) -> None:
    coordinator, config = world
    fleet = coordinator.fleet
    revocations = fleet.revocations(2, (fleet.signer("d-2").certificate.serial,))
    async with inside(config):
        rnd = with_key(fleet, config, await coordinator.key())
        await coordinator.session.publish(CLOUD.broadcast(Broadcast.REVOKED), revocations, retain=True)
        await coordinator.ask(rnd, rnd.request())
        assert (await coordinator.answers(1))[0][1].reason is RejectReason.REVOKED
    await coordinator.session.publish(CLOUD.broadcast(Broadcast.REVOKED), b"", retain=True)
    async with inside(config):
        await coordinator.hears(Verb.KEY, 2)
        await coordinator.ask(rnd, rnd.request())
        assert (await coordinator.answers(2))[1][1].reason is RejectReason.REVOKED


async def test_the_pinned_policy_is_the_owners(world: tuple[Coordinator, Path]) -> None:
    """Only what the trust metadata lists may speak as coordinator, and no plan may be weaker than its policy."""
    coordinator, config = world
    fleet = coordinator.fleet
    owners = Owners(
        now=fleet.now,
        authority=fleet.authority,
        coordinators=[fleet.coordinator.certificate.public_key],
        policy=Policy(version=1, minimum_cohort=3),
    )
    identity = replace(fleet.identity(NAME, Role.HELPER, "_"), root=owners.roots[0])
    shutil.rmtree(config.parent / "identity")
    identity.save(config.parent / "identity")
    async with inside(config) as helper:
        weak = with_key(fleet, config, await coordinator.key(), policy=1, split={"minimum_cohort": 2})
        # Nothing says yet who coordinates.
        await coordinator.ask(weak, weak.request())
        await eventually(lambda: sum(helper.counters.snapshot().values()) == 1)
        await coordinator.session.publish(CLOUD.broadcast(Broadcast.TRUST), owners.bundle(), retain=True)
        await coordinator.ask(weak, weak.request())
        assert (await coordinator.answers(1))[0][1].reason is RejectReason.BELOW_POLICY
        good = with_key(fleet, config, await coordinator.key(), round=2, policy=1, split={"minimum_cohort": 3})
        await coordinator.ask(good, good.request())
        assert (await coordinator.answers(2))[1][1].reason is None
    assert (config.parent / "state" / "trust.bin").exists()


async def test_what_the_coordinator_did_not_sign_gets_no_answer(world: tuple[Coordinator, Path]) -> None:
    coordinator, config = world
    async with inside(config, request_mib=1) as helper:
        fleet = coordinator.fleet
        rnd = with_key(fleet, config, await coordinator.key())
        topic = CLOUD.down(Kind.HELPER, NAME, Verb.ASK)
        gateway = fleet.signer("g-north", Role.GATEWAY, "north")
        forged = gateway.sign(MessageKind.MASK_REQUEST, rnd.request(), now=fleet.now)
        large = fleet.coordinator.sign(MessageKind.MASK_REQUEST, bytes(2_000_000), now=fleet.now)
        for message in (forged, large):
            for frame in cut(message.id, message.encode()):
                await coordinator.session.publish(topic, frame)
        for junk in (b"", b"\xff", b"FFC1" + bytes(24)):
            await coordinator.session.publish(topic, junk)
        await coordinator.ask(rnd, rnd.request())
        assert [sums.reason for _, sums in await coordinator.answers(1)] == [None]
        counted = helper.counters.snapshot()
        assert (counted["wrong_role"], counted["too_large"]) == (1, 1)
        assert sum(counted.values()) == 5


async def test_keys_rotate_while_it_runs(world: tuple[Coordinator, Path]) -> None:
    coordinator, config = world
    now = unix_ms()
    async with inside(config, clock=lambda: now) as helper:
        old = await coordinator.key()
        rnd = with_key(coordinator.fleet, config, old)
        now += 24 * 3_600_000
        helper._timer_changed.set()
        await coordinator.hears(Verb.KEY, 2)
        new = await coordinator.key()
        assert new != old
        # A round that began with the old key is still answered.
        coordinator.fleet.now = now
        later = with_key(coordinator.fleet, config, old)
        await coordinator.ask(later, later.request())
        assert [sums.reason for _, sums in await coordinator.answers(1)] == [None]
        now += 24 * 3_600_000 + 10 * 60_000
        helper._timer_changed.set()
        await coordinator.hears(Verb.KEY, 3)
        coordinator.fleet.now = now
        await coordinator.ask(rnd, later.request())
        assert (await coordinator.answers(2))[1][1].reason in (RejectReason.WRONG_PLAN, RejectReason.LATE)
        assert len(helper.store.keys()) == 2


# --- The program -----------------------------------------------------------------------------------------------------


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    assert "fleetfed-helper run --config helper.toml" in capsys.readouterr().out


def test_a_gateways_identity_cannot_run_a_helper(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SignedFleet().identity("g-1", Role.GATEWAY, "north").save(tmp_path / "identity")
    (tmp_path / "helper.toml").write_text(SHORT.format(port=1))
    assert cli.main(["run", "--config", str(tmp_path / "helper.toml")]) == cli.BAD_CONFIG
    assert "needs helper" in capsys.readouterr().err


def test_a_damaged_state_is_exit_code_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SignedFleet().identity(NAME, Role.HELPER, "_").save(tmp_path / "identity")
    (tmp_path / "helper.toml").write_text(SHORT.format(port=1))
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "helper.db").write_bytes(b"nothing that SQLite knows" * 50)
    assert cli.main(["run", "--config", str(tmp_path / "helper.toml")]) == cli.BAD_STORAGE
    assert "helper.db" in capsys.readouterr().err


def test_status_before_the_first_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "helper.toml").write_text(SHORT.format(port=1))
    assert cli.main(["status", "--config", str(tmp_path / "helper.toml")]) == cli.BAD_CONFIG
    assert "once the helper runs" in capsys.readouterr().err


def test_unknown_settings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "helper.toml").write_text(SHORT.format(port=1) + 'log_level = "loud"\n')
    with pytest.raises(ConfigError):
        load(tmp_path / "helper.toml")
    (tmp_path / "helper.toml").write_text("rotate = 1\n" + SHORT.format(port=1))
    with pytest.raises(ConfigError, match="rotate"):
        load(tmp_path / "helper.toml")


def test_it_imports_nothing_of_the_coordinator() -> None:
    """In a process of its own: this one has imported everything already."""
    code = (
        "import sys, fleetfed.cloud_coordinator.helper.cli, fleetfed.cloud_coordinator.helper.runtime\n"
        "own = 'fleetfed.cloud_coordinator.helper'\n"
        "print([name for name in sys.modules if name.startswith('fleetfed.')\n"
        "       and not name.startswith(('fleetfed.shared', own)) and name != 'fleetfed.cloud_coordinator'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
