"""Keys: RFC 5869's own vectors, and labels that keep purposes apart."""

from __future__ import annotations

import itertools

import pytest

from fleetfed.shared.secure.kdf import Label, derive, hkdf, lp

# RFC 5869, appendix A.1 to A.3: secret, salt, info, output.
RFC_5869 = [
    (
        b"\x0b" * 22,
        bytes(range(13)),
        bytes(range(0xF0, 0xFA)),
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
    ),
    (
        bytes(range(0x50)),
        bytes(range(0x60, 0xB0)),
        bytes(range(0xB0, 0x100)),
        "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09"
        "da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87",
    ),
    (
        b"\x0b" * 22,
        b"",
        b"",
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
    ),
]


@pytest.mark.parametrize(("secret", "salt", "info", "output"), RFC_5869)
def test_rfc_5869(secret: bytes, salt: bytes, info: bytes, output: str) -> None:
    expected = bytes.fromhex(output)
    assert hkdf(secret, salt=salt, info=info, size=len(expected)) == expected
    assert hkdf(secret, salt=salt, info=info, size=32) == expected[:32]


def test_a_label_and_a_context_of_its_own_for_every_key() -> None:
    keys = [derive(b"s" * 32, label, context) for label, context in itertools.product(Label, (b"", b"a", b"ab"))]
    assert len(set(keys)) == len(keys)
    assert {len(key) for key in keys} == {32}


def test_derive_is_the_hkdf_that_the_document_states() -> None:
    info = b"\7\0\0\0ff-sa/1" + b"\6\0\0\0S/mask" + b"\3\0\0\0abc"
    assert derive(b"seed", Label.MASK, b"abc") == hkdf(b"seed", salt=b"ff-sa/1", info=info, size=32)


def test_lengths_keep_parts_apart() -> None:
    assert lp(b"ab", b"c") != lp(b"a", b"bc")
    assert lp(b"ab") != lp(b"ab", b"")
