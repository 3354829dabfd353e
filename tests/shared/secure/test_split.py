"""One masked update under attack: every bit of it, and every part of it moved elsewhere."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from fleetfed_testing.masked_round import MaskedRound, new_secret, random_words

from fleetfed.shared.aggregate.lanes import LaneLayout
from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.secure import box, prg, split
from fleetfed.shared.secure.box import Reader, SealSecret, seal
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.trust.signer import Message
from fleetfed.shared.wire.envelope import HEADER_SIZE, Head, MessageKind, digest, parse_head
from fleetfed.shared.wire.update import BOX_SIZE, EXTENSION_SIZE, UpdateExtension

LAYOUT = LaneLayout(dimension=10, lane_bits=16, meta_words=3)
RNG = np.random.default_rng(1)


@pytest.fixture(params=["cryptography", "libsodium"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both implementations of the ciphers; the second is that of a device where `cryptography` is not installed."""
    name = str(request.param)
    if name == "libsodium":
        monkeypatch.setattr(prg, "_library", lambda: None)
        monkeypatch.setattr(box, "_library", lambda: None)
    return name


@pytest.fixture
def rnd() -> MaskedRound:
    return MaskedRound.of(LAYOUT, helper=True)


@pytest.fixture
def update(rnd: MaskedRound) -> Message:
    return rnd.update("d-victim", random_words(LAYOUT, RNG))


def reason_of(action: Callable[[], object]) -> RejectReason:
    with pytest.raises(RemoteProtocolError) as raised:
        action()
    return raised.value.reason


def receive(rnd: MaskedRound, raw: bytes) -> None:
    """All that is checked of an update by those whom it is for."""
    head = parse_head(raw)
    verifier = rnd.fleet.identity("g-north", role=Role.GATEWAY, site="north").verifier()
    verifier.head(head, kind=MessageKind.UPDATE, now=rnd.fleet.now)
    split.open_words(head, memoryview(raw)[head.size :], secret=rnd.gateway, n_words=LAYOUT.n_words)
    for reader, secret in rnd.holders.items():
        split.open_seed(head, reader, secret)


def flipped(raw: bytes, bit: int) -> bytes:
    out = bytearray(raw)
    out[bit // 8] ^= 1 << bit % 8
    return bytes(out)


def test_what_was_masked_comes_out(library: str) -> None:
    rnd = MaskedRound.of(LAYOUT, helper=True)
    words = random_words(LAYOUT, RNG)
    update = rnd.update("d-1", words)
    receive(rnd, update.encode())
    masked = rnd.opened(update)
    assert (masked != words).all()
    assert (rnd.unmask(masked, [update.head]) == words).all()


def test_both_libraries_make_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    rnd, words = MaskedRound.of(LAYOUT), random_words(LAYOUT, RNG)
    bound = split.binding_of(rnd.update("d-1", words).head)

    def body() -> bytes:
        found, _ = split.mask(
            words.copy(),
            bound,
            gateway_key=rnd.gateway.public,
            seed_keys=[(Reader.COORDINATOR, rnd.holders[Reader.COORDINATOR].public)],
            randomness=lambda size: b"r" * size,
            hedge=rnd.hedge,
        )
        return found

    fast = body()
    monkeypatch.setattr(prg, "_library", lambda: None)
    monkeypatch.setattr(box, "_library", lambda: None)
    assert body() == fast


def test_every_bit_of_the_head_is_signed(rnd: MaskedRound, update: Message) -> None:
    raw = update.encode()
    end = update.head.size
    reasons = {bit: reason_of(lambda bit=bit: receive(rnd, flipped(raw, bit))) for bit in range(8 * end)}
    allowed = {
        range(4): {RejectReason.MALFORMED},
        range(4, 8): {
            RejectReason.UNKNOWN_VERSION,
            RejectReason.MALFORMED,
            RejectReason.TOO_LARGE,
            RejectReason.BAD_SIGNATURE,
        },
        range(8, 24): {RejectReason.WRONG_FLEET},
        range(24, 40): {RejectReason.BAD_CERTIFICATE},
        range(40, 88): {RejectReason.BAD_SIGNATURE},
        # Sizes: where they do not fit each other, or the bytes that came, the head does not even parse.
        range(88, 100): {
            RejectReason.TOO_LARGE,
            RejectReason.MALFORMED,
            RejectReason.TRUNCATED,
            RejectReason.BAD_CERTIFICATE,
        },
        range(100, HEADER_SIZE + len(update.head.extension) + 64): {RejectReason.BAD_SIGNATURE},
        range(HEADER_SIZE + len(update.head.extension) + 64, end): {RejectReason.BAD_CERTIFICATE},
    }
    for place, expected in allowed.items():
        assert {reasons[8 * at + bit] for at in place for bit in range(8)} <= expected, place


def test_every_bit_of_the_body_is_hashed(rnd: MaskedRound, update: Message) -> None:
    raw, start = update.encode(), 8 * update.head.size
    found = Counter(reason_of(lambda bit=bit: receive(rnd, flipped(raw, bit))) for bit in range(start, 8 * len(raw)))
    assert found == {RejectReason.BODY_MISMATCH: 8 * len(update.body)}


def signed_again(rnd: MaskedRound, head: Head, body: bytes, *, extension: bytes, device: str) -> Message:
    """The head of a device that signs for itself what it took from another: all but its own name is the victim's."""
    signer = rnd.fleet.signer(device)
    header = replace(
        head.header,
        sender=signer.certificate.key_id,
        body_hash=digest(body),
        certificate_size=len(signer._encoded_certificate),
    )
    return signer._message(header, body, extension)


def test_every_bit_of_a_body_that_its_own_sender_signed_is_authenticated(rnd: MaskedRound, update: Message) -> None:
    for bit in range(8 * len(update.body)):
        body = flipped(update.body, bit)
        changed = signed_again(rnd, update.head, body, extension=update.head.extension, device="d-victim")
        assert reason_of(lambda changed=changed: rnd.opened(changed)) is RejectReason.BAD_BOX


@pytest.mark.parametrize("reader", list(Reader))
def test_every_bit_of_a_box_that_its_own_sender_signed_is_authenticated(
    rnd: MaskedRound, update: Message, reader: Reader
) -> None:
    start = 8 * (EXTENSION_SIZE + BOX_SIZE * reader.place)
    opened = 0
    for bit in range(start, start + 8 * BOX_SIZE):
        changed = signed_again(
            rnd, update.head, update.body, extension=flipped(update.head.extension, bit), device="d-victim"
        )
        # X25519 ignores the highest bit of a public key, but the seal's nonce is made of all of them.
        with pytest.raises(RemoteProtocolError) as raised:
            receive(rnd, changed.encode())
        assert raised.value.reason is RejectReason.BAD_BOX
        opened += 1
    assert opened == 8 * BOX_SIZE


def test_a_copied_update_under_another_name_opens_to_nothing(rnd: MaskedRound, update: Message) -> None:
    """S-2: the sum of n copies of a victim's update would be n times its contribution."""
    for device in ("d-sybil-1", "d-sybil-2"):
        copy = signed_again(rnd, update.head, update.body, extension=update.head.extension, device=device)
        assert copy.head.header.message_id == update.id
        assert reason_of(lambda copy=copy: rnd.opened(copy)) is RejectReason.BAD_BOX
        for reader, secret in rnd.holders.items():
            head = copy.head
            assert reason_of(lambda: split.open_seed(head, reader, secret)) is RejectReason.BAD_BOX  # noqa: B023


@pytest.mark.parametrize("field", ["plan", "model_sha256", "dimension"])
def test_a_box_of_another_extension(rnd: MaskedRound, update: Message, field: str) -> None:
    """Another plan, model or shape than the one that the device masked for."""
    extension = UpdateExtension.decode(update.head)
    other = {"plan": b"o" * 32, "model_sha256": b"o" * 32, "dimension": 11}[field]
    moved = replace(extension, **{field: other}).encode()
    changed = signed_again(rnd, update.head, update.body, extension=moved, device="d-victim")
    assert reason_of(lambda: rnd.opened(changed)) is RejectReason.BAD_BOX
    for reader, secret in rnd.holders.items():
        assert reason_of(lambda: split.open_seed(changed.head, reader, secret)) is RejectReason.BAD_BOX  # noqa: B023


def test_boxes_that_changed_places(rnd: MaskedRound, update: Message) -> None:
    """A gateway's box that carries a seed, or a coordinator's that carries the helper's, is not what it is read as."""
    gateway, coordinator, helper = UpdateExtension.decode(update.head).boxes
    extension = replace(UpdateExtension.decode(update.head), boxes=(gateway, helper, coordinator)).encode()
    changed = signed_again(rnd, update.head, update.body, extension=extension, device="d-victim")
    for reader in rnd.holders:
        # Even one who holds both secrets: each box says for whom it is.
        for secret in rnd.holders.values():
            assert reason_of(lambda: split.open_seed(changed.head, reader, secret)) is RejectReason.BAD_BOX  # noqa: B023


def test_a_key_sealed_for_another_reader(rnd: MaskedRound, update: Message) -> None:
    bound, secret = split.binding_of(update.head), new_secret()
    sealed = seal(b"k" * 32, Reader.HELPER, bound, secret.public)
    assert secret.open(sealed, Reader.HELPER, bound) == b"k" * 32
    assert reason_of(lambda: secret.open(sealed, Reader.COORDINATOR, bound)) is RejectReason.BAD_BOX
    assert reason_of(lambda: new_secret().open(sealed, Reader.HELPER, bound)) is RejectReason.BAD_BOX
    for junk in (b"", sealed[:40], bytes(BOX_SIZE), sealed + b"x"):
        assert reason_of(lambda junk=junk: secret.open(junk, Reader.HELPER, bound)) is RejectReason.BAD_BOX


def test_nothing_is_sealed_to_a_point_of_small_order(rnd: MaskedRound, update: Message) -> None:
    """Everybody would know the key that is shared with it."""
    for point in (bytes(32), b"\1" + bytes(31)):
        sealed = lambda point=point: seal(b"k" * 32, Reader.GATEWAY, split.binding_of(update.head), point)  # noqa: E731
        assert reason_of(sealed) is RejectReason.BAD_BOX


def test_a_body_of_another_length(rnd: MaskedRound, update: Message) -> None:
    def opened() -> object:
        return split.open_words(update.head, update.body, secret=rnd.gateway, n_words=LAYOUT.n_words + 1)

    assert reason_of(opened) is RejectReason.WRONG_SHAPE


def test_an_update_without_the_helpers_box(update: Message) -> None:
    rnd = MaskedRound.of(LAYOUT)
    single = rnd.update("d-1", random_words(LAYOUT, RNG))
    opened = lambda: split.open_seed(single.head, Reader.HELPER, new_secret())  # noqa: E731
    assert reason_of(opened) is RejectReason.MALFORMED


@pytest.mark.parametrize("helper", [False, True])
def test_all_updates_of_a_round_have_one_length(helper: bool) -> None:
    rnd = MaskedRound.of(LAYOUT, helper=helper)
    zeros, full = LAYOUT.zeros(), np.full(LAYOUT.n_words, (1 << 64) - 1, dtype=np.uint64)
    updates = [rnd.update("d-1", words) for words in (zeros, full, random_words(LAYOUT, RNG))]
    assert len({len(update.encode()) for update in updates}) == 1


def test_what_a_gateway_sees_says_nothing_about_the_values() -> None:
    """Kolmogorov-Smirnov on the words of two extreme inputs: both are uniform."""
    layout = LaneLayout(dimension=80_000, lane_bits=16)
    rnd = MaskedRound.of(layout)
    zeros, full = layout.zeros(), np.full(layout.n_words, (1 << 64) - 1, dtype=np.uint64)
    seeded = np.random.default_rng(5)
    for words in (zeros, full):
        seen = np.sort(rnd.opened(rnd.update("d-1", words, randomness=seeded.bytes)).astype(np.float64) / 2.0**64)
        steps = np.arange(seen.size) / seen.size
        assert float(np.abs(seen - steps).max()) < 1.95 / np.sqrt(seen.size)


def test_a_frozen_generator_still_gives_every_header_its_own_seed() -> None:
    """A cloned card whose randomness repeats: headers differ, so do seeds, and the masks do not cancel."""
    rnd, words = MaskedRound.of(LAYOUT), random_words(LAYOUT, RNG)
    updates = [rnd.update("d-1", words, randomness=lambda size: bytes(size)) for _ in range(2)]
    seeds = {split.open_seed(each.head, Reader.COORDINATOR, rnd.holders[Reader.COORDINATOR]) for each in updates}
    assert len(seeds) == 2
    masked = [rnd.opened(each) for each in updates]
    assert (masked[0] != masked[1]).all()


def test_a_frozen_generator_gives_the_coordinator_no_seed_of_the_helpers(rnd: MaskedRound) -> None:
    """Who holds one seed would hold both, and with a gateway read the update that a helper is to protect."""
    update = rnd.update("d-1", random_words(LAYOUT, RNG), randomness=lambda size: bytes(size))
    seeds = {split.open_seed(update.head, reader, secret) for reader, secret in rnd.holders.items()}
    assert len(seeds) == len(rnd.holders) == 2


def test_the_hedge_alone_hides_a_seed_from_whoever_knows_the_randomness(rnd: MaskedRound) -> None:
    words, frozen = random_words(LAYOUT, RNG), lambda size: bytes(size)
    update = rnd.update("d-1", words, randomness=frozen)
    rnd.hedge = secrets.token_bytes(32)
    bound, secret = split.binding_of(update.head), rnd.holders[Reader.COORDINATOR]
    _, boxes = split.mask(
        words.copy(),
        bound,
        gateway_key=rnd.gateway.public,
        seed_keys=[(Reader.COORDINATOR, secret.public)],
        randomness=frozen,
        hedge=rnd.hedge,
    )
    assert secret.open(boxes[1], Reader.COORDINATOR, bound) != split.open_seed(update.head, Reader.COORDINATOR, secret)


def test_a_secret_is_in_no_repr() -> None:
    secret = SealSecret.from_bytes(b"s" * 32)
    assert secret.encode().hex() not in repr(secret)
    assert SealSecret.from_bytes(secret.encode()).public == secret.public
