"""Faults planted on purpose: the simulation is worth something only while random runs find every one of them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from fleetfed.cloud_coordinator.storage import restore
from fleetfed.device.store import Store as DeviceStore
from fleetfed.gateway import journal
from fleetfed.gateway.perform import Performer
from fleetfed.gateway.round import RoundMachine
from fleetfed.gateway.state import GatewayMachine
from fleetfed.gateway.summation import Summation
from fleetfed.shared.wire.envelope import MessageId, parse_head
from fleetfed.shared.wire.topics import Kind, Verb
from tests.simulation.ops import Op, StartRound, operations
from tests.simulation.test_every_step import deaths
from tests.simulation.world import simulate

RUNS = 200
NEVER = 1_000_000


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


FAULTS = {
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


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", FAULTS)
def test_random_runs_find(fault: str) -> None:
    assert runs_until_found(FAULTS[fault]) < NEVER


def runs_until_found(plant: Callable[[], AbstractContextManager[Any]]) -> int:
    """How many random runs it takes to fail; `NEVER` for never."""
    runs = 0

    def attempt(done: Iterable[Op], number: int = 0) -> None:
        nonlocal runs
        runs += 1
        try:
            simulate(done, seed=number)
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
    @given(operations, st.integers(0, 1000))
    def look(done: list[Op], number: int) -> None:
        attempt([StartRound(2), *done], number)

    with plant(), contextlib.suppress(FoundError):
        look()
        # Some windows are too narrow for chance.
        for operations_ in deaths(1):
            attempt(operations_)
        return NEVER
    return runs
