from __future__ import annotations

import itertools
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.trust.certificates import Certificate, Role, issue
from fleetfed.shared.trust.keys import SigningKey
from fleetfed.shared.trust.signer import Message, Signer
from fleetfed.shared.wire.chunks import FRAME_SIZE, Assembler, parse_chunk, split
from fleetfed.shared.wire.envelope import Head, MessageKind, open_body

AUTHORITY = SigningKey.from_seed(b"a" * 32)
KEY = SigningKey.from_seed(b"k" * 32)
CERTIFICATE = Certificate(
    serial=1, role=Role.DEVICE, fleet="f", id="d-1", site="s", not_before=0, not_after=2**50, public_key=KEY.public
)
numbers = itertools.count(1)
SIGNER = Signer(KEY, CERTIFICATE, issue(CERTIFICATE, AUTHORITY), sequence=lambda: next(numbers), randomness=os.urandom)


def message(size: int) -> Message:
    return SIGNER.sign(MessageKind.UPDATE, os.urandom(size), now=1)


def accept(_head: Head) -> None:
    """Admit everything."""


def feed_all(assembler: Assembler, frames: list[bytes]) -> bytes | None:
    whole = None
    for frame in frames:
        done = assembler.feed(frame)
        if done is not None:
            head, body = done
            assert open_body(head.header, body) == bytes(body)
            whole = head.encode() + bytes(body)
    return whole


@settings(max_examples=40)
@given(size=st.integers(1, 9000), chunk=st.integers(2000, 4000), data=st.data())
def test_chunks_in_any_order_after_the_first_and_any_number_of_times_give_the_message(
    size: int, chunk: int, data: st.DataObject
) -> None:
    sent = message(size)
    frames = split(sent.id, sent.encode(), chunk=chunk)
    extra = data.draw(st.lists(st.sampled_from(frames), max_size=5))
    order = [frames[0], *data.draw(st.permutations(frames[1:] + extra))]
    assembler = Assembler(accept)
    assert feed_all(assembler, order) == sent.encode()


def test_the_head_is_judged_before_memory_is_reserved() -> None:
    sent = message(500_000)
    frames = split(sent.id, sent.encode())

    def refuse(_head: Head) -> None:
        assert assembler.reserved == 0
        raise RemoteProtocolError(RejectReason.REVOKED)

    assembler = Assembler(refuse)
    with pytest.raises(RemoteProtocolError) as caught:
        assembler.feed(frames[0])
    assert caught.value.reason is RejectReason.REVOKED
    assert assembler.feed(frames[1]) is None
    assert assembler.reserved == 0


def test_another_message_of_the_same_sender_replaces_the_one_in_progress() -> None:
    first, second = message(5000), message(5000)
    assembler = Assembler(accept)
    assembler.feed(split(first.id, first.encode(), chunk=2000)[0])
    assert feed_all(assembler, split(second.id, second.encode(), chunk=2000)) == second.encode()
    assert assembler.reserved == 0


@given(st.binary(max_size=300))
def test_garbage_is_refused(frame: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_chunk(frame)


@settings(max_examples=60)
@given(position=st.integers(0, 200), value=st.integers(0, 255))
def test_a_changed_byte_anywhere_never_yields_another_message(position: int, value: int) -> None:
    sent = message(3000)
    frames = split(sent.id, sent.encode(), chunk=2000)
    changed = bytearray(frames[0])
    changed[position] = value
    assembler = Assembler(accept)
    try:
        for frame in (bytes(changed), *frames[1:]):
            done = assembler.feed(frame)
            if done is not None and bytes(changed) != frames[0]:
                head, body = done
                # What the frame let through, the signature or the body's hash must stop.
                assert head.encode() + bytes(body) != sent.encode()
    except RemoteProtocolError:
        pass


@pytest.mark.parametrize("claimed", [2**32 - 1, 10**8])
def test_a_frame_that_claims_a_huge_message_reserves_nothing(claimed: int) -> None:
    sent = message(10)
    frame = bytearray(split(sent.id, sent.encode())[0])
    frame[FRAME_SIZE - 8 : FRAME_SIZE] = (
        (0).to_bytes(2, "little") + (2).to_bytes(2, "little") + claimed.to_bytes(4, "little")
    )
    assembler = Assembler(accept)
    with pytest.raises(RemoteProtocolError):
        assembler.feed(bytes(frame))
    assert assembler.reserved == 0
