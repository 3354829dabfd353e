"""What the device believes, byte by byte; `test_runtime` sends the same over a broker."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from fleetfed_testing.lone_gateway import Authority, signer_of
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetfed.device import events as e
from fleetfed.device.inbound import Inbound
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.envelope import MessageKind
from fleetfed.shared.wire.messages import (
    Life,
    Outcome,
    Plan,
    Presence,
    Quantization,
    Receipt,
    Revocations,
    RoundEnd,
)

NOW = unix_ms()
AUTHORITY = Authority()
DEVICE = AUTHORITY.member(Role.DEVICE, "d-1")
COORDINATOR = signer_of(AUTHORITY.member(Role.COORDINATOR, "coordinator", "_"))
GATEWAY = signer_of(AUTHORITY.member(Role.GATEWAY, "g-1"))
ROOT = "ff1/demo/north"

PLAN = Plan(
    round=1,
    model_version=1,
    model_sha256=bytes(32),
    dimension=10,
    quantization=Quantization(bits=4, lane_bits=16, clips=(1.0,), weight_cap=10),
    opened=NOW,
    deadline=NOW + 1000,
    expires=NOW + 2000,
    nonce=bytes(16),
)
RECEIPT = Receipt(message_id=bytes(16), head=bytes(32))


def inbound() -> Inbound:
    return Inbound(DEVICE.verifier(), DEVICE.certificate, keep_revocations=lambda _: None)


def plan_message(plan: Plan = PLAN) -> bytes:
    return COORDINATOR.sign(MessageKind.PLAN, plan, now=NOW, round=plan.round, lifetime=2000).encode()


def refused(topic: str, payload: bytes) -> RejectReason:
    with pytest.raises(RemoteProtocolError) as caught:
        inbound().event(topic, payload, NOW)
    return caught.value.reason


def test_a_plan_and_its_end() -> None:
    event = inbound().event(f"{ROOT}/b/plan", plan_message(), NOW)
    assert event.plan == PLAN
    end = RoundEnd(round=1, plan=event.plan_hash, outcome=Outcome.COMMITTED)
    message = COORDINATOR.sign(MessageKind.ROUND_END, end, now=NOW, round=1).encode()
    assert inbound().event(f"{ROOT}/b/plan", message, NOW) == e.RoundEnded(end)


def test_a_receipt_is_the_own_gateways() -> None:
    message = GATEWAY.sign(MessageKind.RECEIPT, RECEIPT, now=NOW).encode()
    topic = f"{ROOT}/d/d-1/dn/receipt"
    assert inbound().event(topic, message, NOW) == e.ReceiptArrived(RECEIPT)
    other = signer_of(AUTHORITY.member(Role.GATEWAY, "g-2", "south"))
    assert refused(topic, other.sign(MessageKind.RECEIPT, RECEIPT, now=NOW).encode()) is RejectReason.WRONG_SITE
    liar = signer_of(AUTHORITY.member(Role.DEVICE, "d-2"))
    assert refused(topic, liar.sign(MessageKind.RECEIPT, RECEIPT, now=NOW).encode()) is RejectReason.WRONG_ROLE


@pytest.mark.parametrize("retained", [False, True])
def test_presence_of_the_gateway(retained: bool) -> None:
    for life in Life:
        payload = codec.encode(Presence(life=life, session=3))
        event = inbound().event(f"{ROOT}/b/node", payload, NOW, retained=retained)
        assert event == (e.NodeBorn(retained) if life is Life.READY else None)


def test_what_is_not_for_us() -> None:
    message = plan_message()
    assert refused("ff1/other/north/b/plan", message) is RejectReason.WRONG_FLEET
    assert refused("ff1/demo/south/b/plan", message) is RejectReason.WRONG_SITE
    assert refused("other/topic", message) is RejectReason.MALFORMED
    assert refused(f"{ROOT}/b/plan", message + b"x") is RejectReason.MALFORMED
    assert refused(f"{ROOT}/b/plan", bytes(300_000)) is RejectReason.TOO_LARGE
    assert inbound().event(f"{ROOT}/b/plan", b"", NOW) is None
    assert inbound().event(f"{ROOT}/d/d-2/dn/receipt", message, NOW) is None
    assert inbound().event(f"{ROOT}/b/status", message, NOW) is None


def test_a_plan_whose_times_are_out_of_order() -> None:
    for changes in ({"deadline": NOW - 1}, {"expires": NOW + 999}):
        message = plan_message(dataclasses.replace(PLAN, **changes))
        assert refused(f"{ROOT}/b/plan", message) is RejectReason.MALFORMED


def test_an_expired_plan() -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        inbound().event(f"{ROOT}/b/plan", plan_message(), NOW + 2001)
    assert caught.value.reason is RejectReason.EXPIRED


_WHOLE = plan_message()


@settings(max_examples=300, deadline=None)
@given(data=st.data(), topic=st.sampled_from(["b/plan", "b/model", "b/revoked", "b/node", "d/d-1/dn/receipt"]))
def test_bytes_are_an_event_or_a_refusal(data: Any, topic: str) -> None:
    """Cut, flipped or made up: parsed, refused with a reason, or nothing; never anything else, never believed."""
    payload = bytearray(_WHOLE)
    how = data.draw(st.sampled_from(["cut", "flip", "noise"]))
    if how == "cut":
        payload = payload[: data.draw(st.integers(1, len(payload) - 1))]
    elif how == "flip":
        payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        payload = bytearray(data.draw(st.binary(min_size=1, max_size=400)))
    try:
        event = inbound().event(f"{ROOT}/{topic}", bytes(payload), NOW)
    except RemoteProtocolError:
        return
    assert event is None or isinstance(event, e.NodeBorn)


def test_a_kept_revocation_list_is_in_force_before_the_clock_is_right() -> None:
    authority = signer_of(AUTHORITY.member(Role.AUTHORITY, "authority", "_"))
    body = Revocations(version=1, serials=(COORDINATOR.certificate.serial,))
    kept: list[bytes] = []
    before = Inbound(DEVICE.verifier(), DEVICE.certificate, keep_revocations=kept.append)
    before.event(f"{ROOT}/b/revoked", authority.sign(MessageKind.REVOCATIONS, body, now=NOW).encode(), NOW)
    after = Inbound(DEVICE.verifier(), DEVICE.certificate, keep_revocations=kept.append)
    after.restore_revocations(kept[0], now=0)
    with pytest.raises(RemoteProtocolError) as caught:
        after.event(f"{ROOT}/b/plan", plan_message(), NOW)
    assert caught.value.reason is RejectReason.REVOKED
    assert len(kept) == 1
