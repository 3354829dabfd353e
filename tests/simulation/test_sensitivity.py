"""Faults planted on purpose: the simulation is worth something only while random runs find every one of them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from fleetfed.cloud_coordinator.helper.checks import Job
from fleetfed.cloud_coordinator.helper.store import Store as HelperStore
from fleetfed.cloud_coordinator.round import SiteRules
from fleetfed.cloud_coordinator.secure.seals import Seals
from fleetfed.cloud_coordinator.storage import restore, tables
from fleetfed.cloud_coordinator.storage.store import Store
from fleetfed.device.store import Store as DeviceStore
from fleetfed.gateway import journal
from fleetfed.gateway.perform import Performer
from fleetfed.gateway.record import RoundSecrets
from fleetfed.gateway.round import RoundMachine
from fleetfed.gateway.state import GatewayMachine
from fleetfed.gateway.summation import Summation
from fleetfed.shared.wire.envelope import MessageId, parse_head
from fleetfed.shared.wire.topics import Kind, Verb
from tests.simulation.ops import (
    CrashCoordinator,
    CrashHelper,
    Deliver,
    DeliverAll,
    Op,
    Restart,
    RevokeDevice,
    StartRound,
    all_train,
    operations,
)
from tests.simulation.setting import BUCKETS, HELPED, PLAIN, SPLIT, Setting
from tests.simulation.test_every_step import deaths
from tests.simulation.world import simulate

RUNS = 200
NEVER = 1_000_000
_SPARSE = 31


class FoundError(Exception):
    """A run failed."""


def _receipt_before_journal() -> AbstractContextManager[Any]:
    def at_once(self: Performer, kind: Kind, member: str, message_id: MessageId) -> None:
        head = parse_head(self._fresh[message_id]).hash if message_id in self._fresh else None
        receipt = self._journal.receipt(message_id) if head is None else self._receipt(message_id, head, None)
        if receipt is not None:
            self.publish(self._below, self._site.down(kind, member, Verb.RECEIPT), receipt)

    return mock.patch.object(Performer, "send_stored_receipt", at_once)


def _update_not_stored() -> AbstractContextManager[Any]:
    return mock.patch.object(journal, "update_rows", return_value=[])


def _fact_not_stored(which: str) -> Callable[[], AbstractContextManager[Any]]:
    rows = journal.fact_rows
    return lambda: mock.patch.object(
        journal, "fact_rows", lambda name, value: [] if name == which else rows(name, value)
    )


def _doubled_after_restart() -> AbstractContextManager[Any]:
    rebuild = Summation.rebuild

    def twice(self: Summation, bodies: Any, reveals: Any) -> None:
        bodies = list(bodies)
        rebuild(self, [*bodies, *bodies[:1]], reveals)

    return mock.patch.object(Summation, "rebuild", twice)


def _lost_after_restart() -> AbstractContextManager[Any]:
    rebuild = Summation.rebuild
    return mock.patch.object(Summation, "rebuild", lambda self, bodies, _reveals: rebuild(self, bodies, []))


def _duplicate_counts() -> AbstractContextManager[Any]:
    take, admit, receive = RoundMachine._take_update, RoundMachine.admit, RoundMachine._check_room

    def forgetful(method: Any) -> Any:
        def without(self: RoundMachine, *arguments: Any, **named: Any) -> Any:
            accepted, ids = dict(self.record.accepted), dict(self._device_of)
            self.record.accepted.clear()
            self._device_of.clear()
            try:
                return method(self, *arguments, **named)
            finally:
                for name, update in accepted.items():
                    self.record.accepted.setdefault(name, update)
                self._device_of.update(ids)

        return without

    return mock.patch.multiple(
        RoundMachine, _take_update=forgetful(take), admit=forgetful(admit), _check_room=forgetful(receive)
    )


def _excluded_stays_in_sum() -> AbstractContextManager[Any]:
    return mock.patch.object(Summation, "drop")


def _partial_doubled_after_restart() -> AbstractContextManager[Any]:
    decode = restore.decode_words

    def doubled(words: Any, ring: Any, *, count: int) -> Any:
        partial = decode(words, ring, count=count)
        partial.words[:2] *= 2
        return partial

    return mock.patch.object(restore, "decode_words", doubled)


def _trained_twice() -> AbstractContextManager[Any]:
    facts = DeviceStore.facts

    def forgotten(self: DeviceStore) -> Any:
        return dataclasses.replace(facts(self), answer=None)

    return mock.patch.object(DeviceStore, "facts", forgotten)


def _census_due_without_a_connection() -> AbstractContextManager[Any]:
    def deadline(self: GatewayMachine) -> int | None:
        times = [self.round.next_deadline() if self.round else None, self._census_due]
        return min((time for time in times if time is not None), default=None)

    return mock.patch.object(GatewayMachine, "next_deadline", deadline)


# --- In rounds of masked updates -------------------------------------------------------------------------------------


def _new_secrets_after_restart(*, seal: bool) -> Callable[[], AbstractContextManager[Any]]:
    decode = RoundSecrets.decode

    def other(stored: bytes) -> RoundSecrets:
        old = decode(stored)
        new = RoundSecrets.new(os.urandom, old.seal.suite)
        return RoundSecrets(new.seal, old.nonce) if seal else RoundSecrets(old.seal, new.nonce)

    return lambda: mock.patch.object(RoundSecrets, "decode", other)


def _new_seal_key_of_coordinator() -> AbstractContextManager[Any]:
    return mock.patch.object(Seals, "of", lambda self, _number, *suite: self.make(*suite))


def _commits_forgotten() -> AbstractContextManager[Any]:
    check = Store._check_schema

    def forgetful(self: Store) -> None:
        check(self)
        self._write(sa.delete(tables.exchanges).where(tables.exchanges.c.reveal_head.is_(None)))

    return mock.patch.object(Store, "_check_schema", forgetful)


def _reveal_made_anew() -> AbstractContextManager[Any]:
    # What it is made from stays as well, or there could be no second one.
    return mock.patch.object(journal, "reveal_rows", return_value=[])


def _key_of_coordinator_kept() -> AbstractContextManager[Any]:
    return mock.patch.object(Store, "drop_seals", return_value=0)


def _key_of_gateway_kept() -> AbstractContextManager[Any]:
    return mock.patch.object(journal, "_ERASE", "SELECT 1")


def _log_not_emptied() -> AbstractContextManager[Any]:
    return mock.patch.object(Store, "wipe", return_value=True)


def _minimum_ignored() -> AbstractContextManager[Any]:
    # The gateway would refuse to follow such a commit; but it must never be signed.
    return mock.patch.object(SiteRules, "judge", return_value=None)


def _helper_adds_another_set() -> AbstractContextManager[Any]:
    add_up = Job.add_up
    return mock.patch.object(
        Job, "add_up", lambda self: add_up(dataclasses.replace(self, sums=tuple(keys[1:] for keys in self.sums)))
    )


def _helper_forgets_its_answers() -> AbstractContextManager[Any]:
    return mock.patch.multiple(HelperStore, claims=lambda _: [], add_answer=_add_or_replace_answer)


def _add_or_replace_answer(self: HelperStore, claim: Any, message: bytes) -> None:
    self._file.execute("DELETE FROM answers WHERE round = ? AND gateway = ?", (claim.round, claim.gateway))
    self._file.executemany(
        "DELETE FROM devices WHERE round = ? AND device = ?", [(claim.round, each) for each in claim.devices]
    )
    _add_answer(self, claim, message)


_add_answer = HelperStore.add_answer

PLAIN_FAULTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "a receipt leaves before the journal is written": _receipt_before_journal,
    "an accepted update is not stored": _update_not_stored,
    "the gateway's proposal is not stored": _fact_not_stored("proposal"),
    "the commit is not stored": _fact_not_stored("commit"),
    "the reveal is not stored": _fact_not_stored("reveal"),
    "an update is added twice after a restart": _doubled_after_restart,
    "partials from below are forgotten by a restart": _lost_after_restart,
    "a repeated update counts again": _duplicate_counts,
    "what a commit leaves out stays in the sum": _excluded_stays_in_sum,
    "the coordinator adds a partial twice after a restart": _partial_doubled_after_restart,
    "a device forgets by a restart that it has answered": _trained_twice,
    "a census is due where nobody can be told": _census_due_without_a_connection,
}
SPLIT_FAULTS: dict[str, tuple[Setting, Callable[[], AbstractContextManager[Any]]]] = {
    "the commit is not stored": (SPLIT, _fact_not_stored("commit")),
    "the coordinator's commit is not stored": (SPLIT, _commits_forgotten),
    "a gateway's seal key is another after a restart": (SPLIT, _new_secrets_after_restart(seal=True)),
    "the coordinator's seal key is another after a restart": (SPLIT, _new_seal_key_of_coordinator),
    "buckets are dealt with a coin that is not stored": (BUCKETS, _new_secrets_after_restart(seal=False)),
    "a reveal is made anew after a restart": (SPLIT, _reveal_made_anew),
    "a masked update is added twice after a restart": (SPLIT, _doubled_after_restart),
    "a repeated masked update counts again": (SPLIT, _duplicate_counts),
    "what a commit leaves out stays in the masked sum": (SPLIT, _excluded_stays_in_sum),
    "a device masks two updates for one plan": (SPLIT, _trained_twice),
    "a sum over too few is committed": (SPLIT, _minimum_ignored),
    "the coordinator keeps its seal key": (SPLIT, _key_of_coordinator_kept),
    "a gateway keeps its seal key": (BUCKETS, _key_of_gateway_kept),
    "the coordinator's log keeps its seal key": (SPLIT, _log_not_emptied),
    "the helper adds up another set": (HELPED, _helper_adds_another_set),
    "the helper forgets what it answered": (HELPED, _helper_forgets_its_answers),
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("fault", PLAIN_FAULTS)
def test_random_runs_find(fault: str) -> None:
    assert runs_until_found(PLAIN_FAULTS[fault]) < NEVER


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("fault", SPLIT_FAULTS)
def test_random_runs_find_in_split_rounds(fault: str) -> None:
    setting, plant = SPLIT_FAULTS[fault]
    assert runs_until_found(plant, setting) < NEVER


def _pairs(setting: Setting) -> Iterator[tuple[Op, ...]]:
    """Two things at once that chance seldom brings together."""
    trained = (StartRound(), DeliverAll(), *all_train(setting))
    both = (CrashHelper(), CrashCoordinator(), Restart("c-main"), *([Restart("h-main")] if setting.helper else []))
    for step in range(14, 92, 4):
        work = Deliver(step, seed=step % 5)
        yield (*trained, work, RevokeDevice(4), DeliverAll(step))
        yield (*trained, work, *both, DeliverAll(step))


def runs_until_found(plant: Callable[[], AbstractContextManager[Any]], setting: Setting = PLAIN) -> int:
    """How many random runs it takes to fail; `NEVER` for never."""
    runs = 0

    def attempt(done: Iterable[Op], number: int = 0) -> None:
        nonlocal runs
        runs += 1
        try:
            simulate(done, seed=number, setting=setting)
        except Exception as error:
            # An assertion here, a program that ended there.
            raise FoundError from error

    @seed(7)
    @settings(
        max_examples=RUNS,
        phases=[Phase.generate],
        database=None,
        derandomize=False,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(operations(setting), st.integers(0, 1000))
    def look(done: list[Op], number: int) -> None:
        attempt([StartRound(2), *done], number)

    with plant(), contextlib.suppress(FoundError):
        # A death here and there finds most of what a restart forgets.
        for death in (*deaths(setting, _SPARSE), *_pairs(setting)):
            attempt(death)
        look()
        # Some windows are too narrow for chance.
        for death in deaths(setting, 1):
            attempt(death)
        return NEVER
    return runs
