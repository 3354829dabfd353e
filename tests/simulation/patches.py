"""What a world puts in the place of parts of the programs: what is outside of them, and eyes on what is inside."""

from __future__ import annotations

import functools
import os
import secrets
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy.random  # noqa: F401 - it binds a function of `secrets` as it is imported, which must not be a world's

from fleetfed.cloud_coordinator import runtime as coordinator_runtime
from fleetfed.cloud_coordinator import service
from fleetfed.cloud_coordinator.helper import runtime as helper_runtime
from fleetfed.cloud_coordinator.secure import reveals
from fleetfed.cloud_coordinator.secure.seals import Seals
from fleetfed.cloud_coordinator.storage import store
from fleetfed.device import runtime as device_runtime
from fleetfed.device import update
from fleetfed.gateway import relay as gateway_relay
from fleetfed.gateway import runtime as gateway_runtime
from fleetfed.gateway.record import RoundSecrets
from fleetfed.shared.machine import Machine
from fleetfed.shared.trust import keys
from tests.simulation.checks import Sum
from tests.simulation.loop import VirtualLoop
from tests.simulation.members import SimulatedDeviceSession, SimulatedWorker
from tests.simulation.network import SimulatedSession
from tests.simulation.thrift import RememberingVerifyKey, engines

if TYPE_CHECKING:
    from tests.simulation.world import World

Patch = tuple[Any, str, Any]
"""A module or class, a name in it, and what that is to mean."""


def outside(loop: VirtualLoop, randomness: Callable[[int], bytes]) -> Iterator[Patch]:
    """Time, connections, threads and randomness; and what would only be computed again."""

    def randbits(bits: int) -> int:
        return int.from_bytes(randomness((bits + 7) // 8), "big") % (1 << bits)

    for module in (coordinator_runtime, gateway_runtime, helper_runtime):
        yield module, "Session", SimulatedSession
    for clocked in (coordinator_runtime, gateway_runtime, gateway_relay):
        yield clocked, "unix_ms", loop.clock
    yield device_runtime, "DeviceSession", SimulatedDeviceSession
    yield device_runtime, "Worker", SimulatedWorker
    # Its default was bound long ago.
    yield update, "Seals", functools.partial(update.Seals, randomness=randomness)
    yield os, "urandom", randomness
    yield secrets, "token_bytes", randomness
    yield secrets, "randbits", randbits
    yield store.sa, "create_engine", engines()
    yield keys, "_SodiumVerifyKey", RememberingVerifyKey


def watched(world: World) -> Iterator[Patch]:
    """Every machine's invariants after every event, and what sums, masks and keys are made of."""
    ledger = world.ledger
    handle, version_of_round, sign = Machine.handle, service.version_of_round, update.sign
    take_masks, keep, new = reveals.take_masks, Seals.keep, RoundSecrets.new

    def handle_and_validate(machine: Any, event: object, now: int) -> Any:
        instructions = handle(machine, event, now)
        machine.validate()
        return instructions

    def note_sum(total: Any, *, plan: Any, **others: Any) -> Any:
        world.sums[plan.round] = Sum.of(total)
        return version_of_round(total, plan=plan, **others)

    def note_contribution(prepared: Any, *arguments: Any, **named: Any) -> Any:
        words = None if prepared.words is None else prepared.words.copy()
        message = sign(prepared, *arguments, **named)
        if words is not None:
            ledger.contributions[message.id] = words
        return message

    def note_unmasking(sums: Any, *arguments: Any) -> None:
        sums = tuple(sums)
        ledger.unmasking(member.message_id for each in sums for member in each.members)
        take_masks(sums, *arguments)

    def note_seal(seals: Any, number: int, secret: Any) -> None:
        ledger.secrets.append(secret.encode())
        keep(seals, number, secret)

    def note_secrets(*arguments: Any) -> Any:
        made = new(*arguments)
        ledger.secrets.append(made.seal.encode())
        return made

    yield Machine, "handle", handle_and_validate
    yield service, "version_of_round", note_sum
    yield update, "sign", note_contribution
    yield reveals, "take_masks", note_unmasking
    yield Seals, "keep", note_seal
    yield RoundSecrets, "new", note_secrets
