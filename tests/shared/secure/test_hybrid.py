"""Suite 3: what differs from suite 1, under the same attacks; the construction itself is checked by the vectors."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from fleetfed_testing.masked_round import MaskedRound, new_secret, random_words

from fleetfed.shared.aggregate.lanes import LaneLayout
from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.secure import hybrid, split
from fleetfed.shared.secure.box import Reader, SealSecret, check_suite, seal
from fleetfed.shared.trust.signer import Message
from fleetfed.shared.wire.envelope import Digest, parse_head
from fleetfed.shared.wire.masking import HYBRID, KEY_SIZES, SEALED_BOX, check_key, suite_of
from fleetfed.shared.wire.update import BOX_SIZES, EXTENSION_SIZE, UpdateExtension

LAYOUT = LaneLayout(dimension=10, lane_bits=16, meta_words=3)
RNG = np.random.default_rng(1)
BOUND = Digest(b"b" * 32)


@pytest.fixture
def rnd() -> MaskedRound:
    return MaskedRound.of(LAYOUT, helper=True, suite=HYBRID)


@pytest.fixture
def update(rnd: MaskedRound) -> Message:
    return rnd.update("d-victim", random_words(LAYOUT, RNG))


def reason_of(action: Callable[[], object]) -> RejectReason:
    with pytest.raises(RemoteProtocolError) as raised:
        action()
    return raised.value.reason


def test_the_sum_of_a_round_and_one_length_for_all_of_it(rnd: MaskedRound) -> None:
    words = [random_words(LAYOUT, RNG) for _ in range(3)]
    updates = [rnd.update(f"d-{i}", each) for i, each in enumerate(words)]
    assert len({len(each.encode()) for each in updates}) == 1
    assert [len(box) for box in UpdateExtension.decode(updates[0].head).boxes] == [BOX_SIZES[HYBRID]] * 3
    # The head as a whole, with three boxes, is read back.
    heads = [parse_head(each.encode()) for each in updates]
    total = sum((rnd.opened(each) for each in updates), LAYOUT.zeros())
    assert (rnd.unmask(total, heads) == sum(words, LAYOUT.zeros())).all()


def test_a_key_pair_is_of_its_32_byte_secret() -> None:
    secret = SealSecret.from_bytes(b"s" * 32, HYBRID)
    assert len(secret.public) == KEY_SIZES[HYBRID]
    assert suite_of(secret.public) == HYBRID
    assert SealSecret.from_bytes(secret.encode(), HYBRID).public == secret.public
    assert SealSecret.from_bytes(b"t" * 32, HYBRID).public != secret.public
    assert b"s" * 8 not in repr(secret).encode()


def test_a_hybrid_box_for_another_reader_or_header_does_not_open() -> None:
    secret = new_secret(HYBRID)
    box = seal(b"k" * 32, Reader.HELPER, BOUND, secret.public, HYBRID)
    assert len(box) == BOX_SIZES[HYBRID]
    assert secret.open(box, Reader.HELPER, BOUND) == b"k" * 32
    assert reason_of(lambda: secret.open(box, Reader.COORDINATOR, BOUND)) is RejectReason.BAD_BOX
    assert reason_of(lambda: secret.open(box, Reader.HELPER, Digest(b"c" * 32))) is RejectReason.BAD_BOX
    assert reason_of(lambda: new_secret(HYBRID).open(box, Reader.HELPER, BOUND)) is RejectReason.BAD_BOX
    for junk in (b"", box[:-1], bytes(len(box)), box + b"x", box[:113]):
        assert reason_of(lambda junk=junk: secret.open(junk, Reader.HELPER, BOUND)) is RejectReason.BAD_BOX


def test_every_bit_of_a_hybrid_box_is_authenticated() -> None:
    """Of the curve's ephemeral key too, the highest bit of which X25519 ignores: the box is bound to all of it."""
    secret = new_secret(HYBRID)
    box = seal(b"k" * 32, Reader.GATEWAY, BOUND, secret.public, HYBRID)
    for bit in range(8 * len(box)):
        changed = bytearray(box)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RemoteProtocolError, match="does not open"):
            secret.open(bytes(changed), Reader.GATEWAY, BOUND)


def test_a_copied_hybrid_update_under_another_suite(rnd: MaskedRound, update: Message) -> None:
    """The suite is in what the boxes are bound to: nobody can say later that it was another one."""
    fixed = update.head.extension[:EXTENSION_SIZE]
    other = replace(UpdateExtension.decode(update.head), suite=SEALED_BOX, boxes=()).fixed()
    assert split.binding(update.head.header, fixed) != split.binding(update.head.header, other)
    head = replace(update.head, extension=other + update.head.extension[EXTENSION_SIZE:])
    assert reason_of(lambda: split.open_seed(head, Reader.COORDINATOR, rnd.holders[Reader.COORDINATOR])) in (
        RejectReason.MALFORMED,
        RejectReason.BAD_BOX,
    )


def test_a_key_of_another_suite_is_no_way_to_a_weaker_seal() -> None:
    """A gateway, or a thief of its key, cosigns a round of suite 3 with a key of suite 1."""
    weak, strong = new_secret().public, new_secret(HYBRID).public
    assert reason_of(lambda: seal(b"k" * 32, Reader.GATEWAY, BOUND, weak, HYBRID)) is RejectReason.BAD_BOX
    assert reason_of(lambda: seal(b"k" * 32, Reader.GATEWAY, BOUND, strong, SEALED_BOX)) is RejectReason.BAD_BOX
    for size in (0, 33, 1215, 1217):
        assert reason_of(lambda size=size: check_key(HYBRID, bytes(size))) is RejectReason.BAD_BOX
        assert reason_of(lambda size=size: suite_of(bytes(size))) is RejectReason.BAD_BOX
    assert reason_of(lambda: check_key(2, bytes(32))) is RejectReason.UNKNOWN_SUITE


def test_nothing_is_sealed_to_what_is_no_hybrid_key() -> None:
    good = new_secret(HYBRID).public
    small_order = good[:1184] + bytes(32)
    out_of_range = b"\xff" * 1184 + good[1184:]
    for bad in (small_order, out_of_range, bytes(1216)):
        assert reason_of(lambda bad=bad: seal(b"k" * 32, Reader.GATEWAY, BOUND, bad, HYBRID)) is RejectReason.BAD_BOX


def test_where_the_library_is_missing_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    public = new_secret(HYBRID).public
    check_suite(HYBRID)
    monkeypatch.setattr(hybrid, "_library", lambda: None)
    for action in (
        lambda: check_suite(HYBRID),
        lambda: SealSecret.from_bytes(secrets.token_bytes(32), HYBRID),
        lambda: seal(b"k" * 32, Reader.GATEWAY, BOUND, public, HYBRID),
    ):
        with pytest.raises(RemoteProtocolError, match=r"fleetfed\[hybrid\]") as refused:
            action()
        assert refused.value.reason is RejectReason.UNKNOWN_SUITE
    # Everything else goes on.
    check_suite(SEALED_BOX)
    own = new_secret()
    assert own.open(seal(b"k" * 32, Reader.GATEWAY, BOUND, own.public), Reader.GATEWAY, BOUND) == b"k" * 32
    assert reason_of(lambda: check_suite(2)) is RejectReason.UNKNOWN_SUITE
