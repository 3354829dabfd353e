"""Answers operators' commands: signed requests on ``o/{operator}/up/req``, signed responses on ``o/{operator}/dn/res``.

A command that changes something is carried out once per message id: its answer is stored in the same transaction as
its effect, and a repeated request gets the stored bytes. So a request must expire (within a day): what is older than
its own expiry cannot be carried out again, and its answer may be forgotten.

``model.publish`` names a file on the coordinator's machine: an operator who is elsewhere copies it there first, with
whatever the site uses for that.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from fleetfed.cloud_coordinator.book import explain
from fleetfed.cloud_coordinator.config import RoundSettings
from fleetfed.cloud_coordinator.control import quarantine, report
from fleetfed.cloud_coordinator.control.arguments import Arguments
from fleetfed.cloud_coordinator.control.errors import CommandError
from fleetfed.cloud_coordinator.events import (
    AbortRequested,
    CertificatesRevoked,
    ModelStored,
    PauseRequested,
    ResumeRequested,
    StartRequested,
)
from fleetfed.cloud_coordinator.privacy.book import PrivacyBudgetError
from fleetfed.cloud_coordinator.publish import REVOCATIONS, Outgoing
from fleetfed.cloud_coordinator.service import Coordinator
from fleetfed.cloud_coordinator.state import State, Wish
from fleetfed.cloud_coordinator.storage.records import VersionRecord
from fleetfed.cloud_coordinator.training.versions import check_reach, from_file, from_version, read_model
from fleetfed.shared import config
from fleetfed.shared.errors import ConfigError, RejectReason, RemoteProtocolError, StorageError
from fleetfed.shared.trust.certificates import SERIALS, Certificate, Role
from fleetfed.shared.trust.verifier import MAX_VERSION_STEP, Verifier
from fleetfed.shared.wire import codec, limits
from fleetfed.shared.wire.envelope import Head, MessageKind
from fleetfed.shared.wire.messages import Command, Life, Request, Response, Revocations
from fleetfed.shared.wire.topics import Kind, Verb

_log = logging.getLogger(__name__)

_LONGEST: Final = 24 * 3600 * 1000
_MAX_ROWS: Final = 500
_READS: Final = frozenset(
    {Command.ROUND_STATUS, Command.MODEL_LIST, Command.MODEL_SHOW, Command.FLEET_LIST, Command.FLEET_SHOW}
)
_RESTING: Final = frozenset({State.NO_MODEL, State.IDLE, State.WAITING, State.PAUSED, State.FINISHED})


class Control:
    """Answers requests.

    Args:
        coordinator: whom they are for.
    """

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    async def request(self, operator: str, message: bytes) -> None:
        """Take a request that came in on ``operator``'s topic, and answer it.

        Raises:
            RemoteProtocolError: it cannot be believed; nobody is answered.
        """
        coordinator = self._coordinator
        if len(message) > limits.MAX_SMALL_MESSAGE:
            raise RemoteProtocolError(RejectReason.TOO_LARGE, f"{len(message)} bytes of request")
        now = coordinator.clock()
        request, head, _ = coordinator.verifier.open(
            message, Request, kind=MessageKind.REQUEST, now=now, sender=operator
        )
        stored = coordinator.store.response(head.header.message_id)
        if stored is not None:
            self._send(operator, stored)
            return
        try:
            if request.command in _READS:
                result = self._read(request)
            else:
                await self._change(operator, request, head)
                return
        except (CommandError, ConfigError) as error:
            self._send(operator, self._refusal(head, error))
            return
        self._send(operator, self._signed(head, result=result))

    async def _change(self, operator: str, request: Request, head: Head) -> None:
        coordinator = self._coordinator
        left = head.header.expires_at - coordinator.clock()
        if not head.header.expires_at or left > _LONGEST:
            raise CommandError("no_expiry", "a command that changes something must expire within 24 hours")
        apply = await self._prepare(request, operator)
        with coordinator.durably():
            response = self._signed(head, result=apply())
            coordinator.store.answer(
                head.header.message_id,
                operator=operator,
                expires=head.header.expires_at,
                response=response,
                now=coordinator.clock(),
            )
        _log.info("%s: %s", operator, request.command)
        self._send(operator, response)

    def _signed(self, head: Head, *, result: dict[str, Any]) -> bytes:
        coordinator = self._coordinator
        response = Response(request=_request_id(head), result=result)
        return coordinator.sign(MessageKind.RESPONSE, response, now=coordinator.clock()).encode()

    def _refusal(self, head: Head, error: CommandError | ConfigError) -> bytes:
        label = error.label if isinstance(error, CommandError) else "invalid"
        detail = error.detail if isinstance(error, CommandError) else str(error)
        coordinator = self._coordinator
        response = Response(request=_request_id(head), error=label, detail=detail[:2000])
        return coordinator.sign(MessageKind.RESPONSE, response, now=coordinator.clock()).encode()

    def _send(self, operator: str, response: bytes) -> None:
        topic = self._coordinator.topics.down(Kind.OPERATOR, operator, Verb.RESPONSE)
        self._coordinator.send(Outgoing(topic=topic, payload=response))

    # --- Commands that change something -------------------------------------------------------------------------------

    async def _prepare(self, request: Request, operator: str) -> Callable[[], dict[str, Any]]:
        """Do what may fail or takes long; return what changes the state, to be called in a transaction."""
        arguments = Arguments(request)
        match request.command:
            case Command.ROUND_START:
                return await self._start(arguments)
            case Command.ROUND_PAUSE:
                arguments.end()
                return self._pause()
            case Command.ROUND_RESUME:
                arguments.end()
                return await self._resume()
            case Command.ROUND_ABORT:
                reason = arguments.text("reason", default="aborted by an operator")
                arguments.end()
                return self._abort(reason)
            case Command.MODEL_PUBLISH:
                file, card = Path(arguments.text("file")), arguments.text("card", default="")
                arguments.end()
                return await self._publish(file, Path(card) if card else file.with_suffix(".card"))
            case Command.MODEL_ROLLBACK:
                number = arguments.integer("version", low=1)
                arguments.end()
                return await self._rollback(number)
            case Command.FLEET_ASIDE:
                device, reason = arguments.text("id"), arguments.text("reason", default="set aside by an operator")
                arguments.end()
                return quarantine.put_aside(self._coordinator, device, reason=reason, operator=operator)
            case Command.FLEET_RELEASE:
                device = arguments.text("id")
                arguments.end()
                return quarantine.release(self._coordinator, device)
            case Command.KEYS_REVOKE:
                revocations = arguments.binary("revocations")
                arguments.end()
                return self._revoke(revocations)
            case Command.KEYS_PUBLISH:
                bundle = arguments.binary("bundle")
                arguments.end()
                return self._trust(bundle)
        raise CommandError("unknown_command", f"{request.command} is not known here; update the coordinator")

    async def _start(self, arguments: Arguments) -> Callable[[], dict[str, Any]]:
        coordinator = self._coordinator
        self._at_rest("round start")
        table = {name: value for name, value in _plain(coordinator.config.rounds).items() if value is not None}
        given = arguments.rest()
        for name, value in given.items():
            if isinstance(value, dict) and name in ("training", "privacy", "defence", "quarantine"):
                table[name] = table.get(name, {}) | value
            else:
                table[name] = value
        settings = config.build(RoundSettings, table, where="round start")
        await self._check(settings)
        # What was at rest may not be so any more.
        self._at_rest("round start")
        return lambda: self._handled(StartRequested(settings))

    async def _check(self, settings: RoundSettings) -> None:
        await self._coordinator.book.privacy.prepare(settings.privacy)
        try:
            self._coordinator.check_settings(settings)
        except RemoteProtocolError as error:
            # Every device would refuse the plan; so its operator is told instead.
            raise CommandError(error.reason.value, explain(error)) from error
        except PrivacyBudgetError as error:
            raise CommandError("privacy_budget", str(error)) from error

    def _pause(self) -> Callable[[], dict[str, Any]]:
        if self._coordinator.machine.run.wish is not Wish.ROUNDS:
            raise CommandError("not_running", "no rounds are running; start them with `fleetfed round start`")
        return lambda: self._handled(PauseRequested())

    async def _resume(self) -> Callable[[], dict[str, Any]]:
        self._paused()
        await self._check(self._coordinator.machine.run.settings)
        # What was paused may not be so any more.
        self._paused()
        return lambda: self._handled(ResumeRequested())

    def _paused(self) -> None:
        if self._coordinator.machine.run.wish is not Wish.PAUSE:
            raise CommandError("not_paused", "rounds are not paused; start them with `fleetfed round start`")

    def _abort(self, reason: str) -> Callable[[], dict[str, Any]]:
        state = self._coordinator.machine.state
        if state is State.STEPPING:
            raise CommandError("too_late", "the round is closed and its version is being made; roll back instead")
        if state is not State.COLLECTING:
            raise CommandError("no_round", f"no round is open; the coordinator is {state}")
        return lambda: self._handled(AbortRequested(reason))

    async def _publish(self, file: Path, card: Path) -> Callable[[], dict[str, Any]]:
        coordinator = self._coordinator
        self._at_rest("model publish")
        newest = coordinator.store.newest_version()
        parent = 0 if newest is None else newest.version

        def work() -> Any:
            source = read_model(file, card)
            evaluator = coordinator.evaluator
            made = from_file(
                source,
                blobs=coordinator.blobs,
                version=parent + 1,
                parent=parent,
                clips=coordinator.config.clips,
                metrics={} if evaluator is None else evaluator.evaluate(source.file, source.card),
                now=coordinator.clock(),
            )
            check_reach(made, newest=newest, blobs=coordinator.blobs, policy=coordinator.verifier.policy)
            return made

        return self._add(await _stored(asyncio.to_thread(work)), "model publish")

    async def _rollback(self, number: int) -> Callable[[], dict[str, Any]]:
        coordinator = self._coordinator
        self._at_rest("model rollback")
        newest = coordinator.store.newest_version()
        source = coordinator.store.version(number)
        if newest is None or source is None:
            raise CommandError("no_such_version", f"there is no version {number}; see `fleetfed model list`")
        if source.sha256 == newest.sha256:
            raise CommandError("same_model", f"version {newest.version} already is what version {number} was")
        blobs = coordinator.blobs

        def work() -> VersionRecord:
            version, now = newest.version + 1, coordinator.clock()
            made = from_version(source, blobs=blobs, version=version, parent=newest.version, now=now)
            check_reach(made, newest=newest, blobs=blobs, policy=coordinator.verifier.policy)
            return made

        return self._add(await _stored(asyncio.to_thread(work)), "model rollback")

    def _add(self, record: Any, what: str) -> Callable[[], dict[str, Any]]:
        # A round may have begun while a thread worked.
        self._at_rest(what)

        def apply() -> dict[str, Any]:
            self._coordinator.add_version(record)
            self._coordinator.handle(ModelStored(record.version))
            return report.version_row(record)

        return apply

    def _at_rest(self, what: str) -> None:
        state = self._coordinator.machine.state
        if state not in _RESTING:
            raise CommandError(
                "round_open",
                f"{what} is not possible while a round is open; run `fleetfed round pause` and wait, or `round abort`",
            )

    def _revoke(self, message: bytes) -> Callable[[], dict[str, Any]]:
        coordinator = self._coordinator
        revocations, by = open_revocations(message, coordinator.verifier, now=coordinator.clock())

        def apply() -> dict[str, Any]:
            before = frozenset(coordinator.verifier.revocations.serials)
            coordinator.verifier.revoke(revocations, by=by)
            after = frozenset(coordinator.verifier.revocations.serials)
            coordinator.store.put_document(REVOCATIONS, message)
            coordinator.publisher.revocations()
            if after - before:
                coordinator.handle(CertificatesRevoked(len(after - before)))
            if coordinator.fleet.revoke(after):
                coordinator.fleet_changed()
            return {"version": revocations.version, "revoked": len(revocations.serials)}

        return apply

    def _trust(self, bundle: bytes) -> Callable[[], dict[str, Any]]:
        try:
            # Durable by itself, and the same when it is asked for again: only the answer is left for the transaction.
            status = self._coordinator.trust.offer(bundle)
        except RemoteProtocolError as error:
            raise CommandError(
                error.reason.value, f"the bundle is refused ({error}); nothing has changed; see `fleetfed keys status`"
            ) from error
        return lambda: status

    def _handled(self, event: object) -> dict[str, Any]:
        self._coordinator.handle(event)
        return self._summary()

    # --- Commands that only look --------------------------------------------------------------------------------------

    def _read(self, request: Request) -> dict[str, Any]:
        arguments = Arguments(request)
        match request.command:
            case Command.ROUND_STATUS:
                arguments.end()
                return self._status()
            case Command.MODEL_LIST:
                limit = arguments.integer("limit", low=1, default=20)
                below = arguments.integer("below", low=1, default=0)
                arguments.end()
                return self._models(min(limit, _MAX_ROWS), below)
            case Command.MODEL_SHOW:
                number = arguments.integer("version", low=1, default=0)
                arguments.end()
                return self._model(number)
            case Command.FLEET_LIST:
                arguments.end()
                return self._fleet()
            case _:
                member = arguments.text("id")
                arguments.end()
                return self._member(member)

    def _summary(self) -> dict[str, Any]:
        status = self._coordinator.status()
        machine = self._coordinator.machine
        return {
            "state": status.state,
            "round": status.round,
            "version": status.version,
            "made": machine.made,
            "rounds": machine.run.settings.rounds,
            "target_accuracy": machine.run.settings.target_accuracy,
        }

    def _status(self) -> dict[str, Any]:
        status = self._coordinator.status()
        fleet, machine = self._coordinator.fleet.summary(), self._coordinator.machine
        return {
            **self._summary(),
            "accepted": status.accepted,
            "expected": status.expected,
            "deadline": status.deadline,
            "gateways_ready": len(fleet.gateways),
            "devices_ready": fleet.devices,
            "devices_needed": machine.needed,
            "waiting_for": status.waiting_for,
            "rejected": self._coordinator.rejected.snapshot(),
            "trust": self._coordinator.trust.status(),
            "settings": _plain(machine.run.settings),
            "privacy": self._coordinator.book.promise(),
            "history": list(status.history),
        }

    def _models(self, limit: int, below: int) -> dict[str, Any]:
        records = self._coordinator.store.versions(limit=limit, below=below or None)
        return {"versions": [report.version_row(record) for record in records]}

    def _model(self, number: int) -> dict[str, Any]:
        store = self._coordinator.store
        record = store.version(number) if number else store.newest_version()
        if record is None:
            what = f"version {number}" if number else "version yet"
            raise CommandError("no_such_version", f"there is no {what}; see `fleetfed model list`")
        row = report.version_row(record)
        card = self._coordinator.cards.of(record)
        row |= {
            "parameters": card.parameters,
            "input_shape": list(card.input_shape),
            "classes": card.classes,
            "tensors": len(card.tensors),
        }
        if record.file is not None:
            row["file"] = str(self._coordinator.blobs.path(record.file))
        round_ = store.round(record.round) if record.round else None
        if round_ is not None:
            row["round_seconds"] = (round_.closed - round_.opened) / 1000
            row["update_bytes_total"] = round_.update_bytes
            if report.PRIVACY in round_.report:
                row["privacy"] = round_.report[report.PRIVACY]
        return row

    def _fleet(self) -> dict[str, Any]:
        fleet = self._coordinator.fleet
        names = sorted(set(fleet.presences) | set(fleet.censuses))
        return {
            "gateways": [self._gateway(name) for name in names[:_MAX_ROWS]],
            "gateways_total": len(names),
            "quarantined": self._coordinator.book.asides.load().rows()[:_MAX_ROWS],
            "devices": sum(census.devices for census in fleet.censuses.values()),
            "devices_ready": sum(
                census.ready for name, census in fleet.censuses.items() if fleet.life(name) is Life.READY
            ),
        }

    def _gateway(self, name: str) -> dict[str, Any]:
        fleet = self._coordinator.fleet
        presence, census = fleet.presences.get(name), fleet.censuses.get(name)
        row: dict[str, Any] = {"id": name, "life": fleet.life(name).value}
        if presence is not None:
            row |= {"since": presence.since, "software": presence.software}
        if census is not None:
            names = ("site", "level", "devices", "ready", "sleeping", "lost", "model_version", "round", "answered")
            row |= {field: getattr(census, field) for field in (*names, "expected")}
        return row

    def _member(self, name: str) -> dict[str, Any]:
        fleet = self._coordinator.fleet
        if name in fleet.presences or name in fleet.censuses:
            census = fleet.censuses.get(name)
            members = () if census is None else census.members
            return {
                "kind": "gateway",
                **self._gateway(name),
                "members": [_plain(member) for member in members[:_MAX_ROWS]],
                "truncated": census is not None and (census.truncated or len(members) > _MAX_ROWS),
            }
        record = self._coordinator.store.device(name)
        gateway, summary = fleet.members().get(name, ("", None))
        if record is None and summary is None:
            raise CommandError(
                "no_such_member", f"{name} has not contributed and is in no census; see `fleetfed fleet list`"
            )
        row: dict[str, Any] = {"kind": "device", "id": name, "gateway": gateway}
        if record is not None:
            row |= _plain(record)
        if summary is not None:
            row |= _plain(summary)
        return row


async def _stored(work: Awaitable[VersionRecord]) -> VersionRecord:
    """A version whose objects are stored; a full disk refuses the command, and nothing else.

    Raises:
        CommandError: an object cannot be read or written.
    """
    try:
        return await work
    except RemoteProtocolError as error:
        raise CommandError(
            error.reason.value,
            f"{error.detail}: devices would refuse it; have the policy's owners name its file first "
            "(`fleetfed keys policy set --model`), or raise largest_step",
        ) from error
    except StorageError as error:
        # Nothing was promised yet. To end for it would end the coordinator again with every copy of the request.
        raise CommandError("storage", str(error)) from error


def open_revocations(message: bytes, verifier: Verifier, *, now: int) -> tuple[Revocations, Certificate]:
    """Verify a revocation list; return it with the certificate of who signed it.

    There is one list, which the authority and the enrolment services sign in turn. A service may add devices that it
    certified itself, and nothing else: it can neither bring anybody back nor shut out a gateway.

    Raises:
        CommandError: it is not theirs, goes too far, or is older than the one in force.
    """
    try:
        revocations, _, by = verifier.open(message, Revocations, kind=MessageKind.REVOCATIONS, now=now)
    except RemoteProtocolError as error:
        raise CommandError(
            "not_the_authoritys", f"the list is refused ({error}); sign it with `fleetfed keys revoke`"
        ) from error
    in_force = verifier.revocations
    another = verifier.has_list and set(revocations.serials) != set(in_force.serials)
    if revocations.version < in_force.version or (revocations.version == in_force.version and another):
        raise CommandError(
            "older_list",
            f"list {revocations.version} does not follow list {in_force.version}, which is in force; sign it again "
            "with --config, or use the newest copy of the authority's folder",
        )
    if by.role is Role.ENROLLER:
        if revocations.version - in_force.version > MAX_VERSION_STEP:
            raise CommandError("too_far", f"list {revocations.version} is too far above list {in_force.version}")
        before, after = set(in_force.serials), set(revocations.serials)
        if missing := before - after:
            raise CommandError("unrevokes", f"the list leaves out {len(missing)} serials that are revoked")
        if any(serial // SERIALS != by.serial for serial in after - before):
            raise CommandError("not_its_devices", f"{by.id} may revoke the devices that it enrolled, and nobody else")
    return revocations, by


def _request_id(head: Head) -> bytes:
    return head.header.message_id


def _plain(value: Any) -> dict[str, Any]:
    """A dataclass as a table of plain values."""
    table = codec.unpack(codec.encode(value), limit=limits.MAX_PLAN) if dataclasses.is_dataclass(value) else value
    assert isinstance(table, dict)
    return table
