"""From the database back to the machine: what a restart needs, and nothing that is not durable."""

from __future__ import annotations

import logging
from typing import Final, TypeVar

from fleetfed.cloud_coordinator.config import RoundSettings
from fleetfed.cloud_coordinator.control import report
from fleetfed.cloud_coordinator.proposals import PlanInForce
from fleetfed.cloud_coordinator.round import Exchange, Round
from fleetfed.cloud_coordinator.state import CoordinatorMachine, Run, Wish
from fleetfed.cloud_coordinator.storage.records import RoundRecord
from fleetfed.cloud_coordinator.storage.store import Store
from fleetfed.shared.aggregate.accumulator import Accumulator, decode_words
from fleetfed.shared.errors import RemoteProtocolError, StorageError
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.envelope import Digest, Head, open_body, parse_head

RUN: Final = "run"
"""Document: what the operator wants."""

_log = logging.getLogger(__name__)

T = TypeVar("T")


def own_message(message: bytes, cls: type[T]) -> tuple[T, Head]:
    """Read a message that was verified, or signed, before it was stored.

    Raises:
        StorageError: it is damaged.
    """
    try:
        head = parse_head(message)
        raw = open_body(head.header, memoryview(message)[head.size :])
        return codec.decode(cls, raw, limit=len(raw)), head
    except RemoteProtocolError as error:
        raise StorageError(f"a stored {cls.__name__} is damaged: {error}") from error


def restore_machine(store: Store, *, settings: RoundSettings, round_: Round | None) -> CoordinatorMachine:
    """Return the machine as the database has it.

    Args:
        store: the database.
        settings: for the case that nobody ever asked for rounds.
        round_: the open round.

    Raises:
        StorageError: what is stored is damaged.
    """
    stored = store.document(RUN)
    run = Run(wish=Wish.NOTHING, settings=settings)
    if stored is not None:
        try:
            run = codec.decode(Run, stored, limit=len(stored))
        except RemoteProtocolError as error:
            raise StorageError(f"the stored run is damaged: {error}") from error
    last = last_round(store)
    return CoordinatorMachine(
        run=run,
        has_model=store.newest_version() is not None,
        last_round=0 if last is None else last.number,
        made=store.made_since(run.first_round),
        accuracy=_last_accuracy(store, run.first_round),
        round_=round_,
    )


def last_round(store: Store) -> RoundRecord | None:
    """The round that was opened last."""
    return next(iter(store.rounds(limit=1)), None)


def _last_accuracy(store: Store, first_round: int) -> float | None:
    """What the newest version reached, if a round of this run made it."""
    newest = store.newest_version()
    for record in store.rounds(limit=report.HISTORY):
        if record.number >= first_round and record.version:
            return record.accuracy if newest is not None and newest.version == record.version else None
    return None


def restore_round(store: Store, record: RoundRecord, *, current: PlanInForce, total: Accumulator) -> Round:
    """Return the bookkeeping of an open round, having added its partials to ``total``.

    Raises:
        StorageError: a partial is missing or damaged.
    """
    plan = current.plan
    round_ = Round(
        number=record.number,
        plan=current.hash,
        expires=record.expires,
        minimum=plan.quorum.minimum,
        cohort_cap=plan.quorum.cohort_cap,
        awaited=record.awaited,
    )
    for each in store.exchanges(record.number):
        round_.exchanges[each.gateway] = Exchange(
            proposal=Digest(each.proposal_head),
            members=len(each.members),
            commit=Digest(each.commit_head),
            reveal=None if each.reveal_head is None else Digest(each.reveal_head),
        )
        round_.holder |= {member.device: each.gateway for member in each.members}
        if each.reveal_head is not None:
            words = store.words(record.number, each.gateway)
            try:
                total.merge(decode_words(words, current.ring, count=len(each.members)))
            except RemoteProtocolError as error:
                raise StorageError(f"the stored partial of {each.gateway} is damaged: {error}") from error
    _log.info("round %d: resumed with %d committed devices", record.number, round_.committed)
    return round_
