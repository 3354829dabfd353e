"""From the database back to the machine: what a restart needs, and nothing that is not durable."""

from __future__ import annotations

import logging
from typing import Final, TypeVar

from fleetfed.cloud_coordinator.config import RoundSettings
from fleetfed.cloud_coordinator.control import report
from fleetfed.cloud_coordinator.proposals import PlanInForce
from fleetfed.cloud_coordinator.round import Exchange, Round, SiteRules
from fleetfed.cloud_coordinator.secure.seeds import seed_hashes
from fleetfed.cloud_coordinator.state import CoordinatorMachine, Run, Wish
from fleetfed.cloud_coordinator.storage.records import ExchangeRecord, RoundRecord
from fleetfed.cloud_coordinator.storage.store import Store
from fleetfed.cloud_coordinator.training.sums import RoundSum, decode_parts
from fleetfed.shared.aggregate.accumulator import Partial, decode_words
from fleetfed.shared.errors import RemoteProtocolError, StorageError
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.envelope import Digest, Head, open_body, parse_head
from fleetfed.shared.wire.messages import Mode, Proposal

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


def restore_run(store: Store, settings: RoundSettings) -> Run:
    """Return what the operator wants, as the database has it.

    Args:
        store: the database.
        settings: for the case that nobody ever asked for rounds.

    Raises:
        StorageError: what is stored is damaged.
    """
    stored = store.document(RUN)
    if stored is None:
        return Run(wish=Wish.NOTHING, settings=settings)
    try:
        return codec.decode(Run, stored, limit=len(stored))
    except RemoteProtocolError as error:
        raise StorageError(f"the stored run is damaged: {error}") from error


def restore_machine(store: Store, *, run: Run, round_: Round | None) -> CoordinatorMachine:
    """Return the machine as the database has it.

    Args:
        store: the database.
        run: what the operator wants.
        round_: the open round.
    """
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


def restore_round(store: Store, record: RoundRecord, *, current: PlanInForce, total: RoundSum) -> Round:
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
        rules=None
        if plan.split is None
        else SiteRules(minimum_cohort=plan.split.minimum_cohort, minimum_owners=plan.split.minimum_owners),
    )
    for each in store.exchanges(record.number):
        round_.exchanges[each.gateway] = Exchange(
            proposal=Digest(each.proposal_head),
            members=len(each.members),
            commit=Digest(each.commit_head),
            reveal=None if each.reveal_head is None else Digest(each.reveal_head),
            contributors=len(each.contributors),
        )
        round_.holder |= {member.device: each.gateway for member in each.members}
        if current.secret is not None:
            proposal = own_message(each.proposal, Proposal)[0]
            round_.seeds |= seed_hashes(proposal.heads, {member.head for member in each.members}, current.secret)
        if each.reveal_head is not None and not each.result.failed:
            total.add(each.gateway, _parts(store.words(record.number, each.gateway), each, current))
    _log.info("round %d: resumed with %d committed devices", record.number, round_.committed)
    return round_


def _parts(words: bytes, exchange: ExchangeRecord, current: PlanInForce) -> tuple[Partial, ...]:
    try:
        if current.plan.mode is Mode.SPLIT:
            return decode_parts(words, current.ring)
        return (decode_words(words, current.ring, count=len(exchange.members)),)
    except RemoteProtocolError as error:
        raise StorageError(f"the stored partial of {exchange.gateway} is damaged: {error}") from error
