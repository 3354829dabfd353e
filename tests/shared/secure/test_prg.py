"""Masks: the same stream from both libraries, no bit of the key lost, and nothing about it that looks like data."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from nacl.utils import randombytes_deterministic

from fleetfed.shared.aggregate.lanes import Words
from fleetfed.shared.secure import prg
from fleetfed.shared.secure.prg import add_mask, add_masks

KEY = bytes(range(32))


@pytest.fixture(params=["cryptography", "libsodium"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to the stream; the second is that of a device where `cryptography` is not installed."""
    name = str(request.param)
    if name == "libsodium":
        monkeypatch.setattr(prg, "_library", lambda: None)
    return name


def stream(key: bytes, words: int) -> Words:
    out = np.zeros(words, dtype=np.uint64)
    add_mask(out, key)
    return out


@pytest.mark.parametrize("words", [0, 1, 7, 8, 9, 16383, 16384, 16385, 125_000])
def test_the_stream_is_libsodiums(library: str, words: int) -> None:
    assert stream(KEY, words).astype("<u8").tobytes() == randombytes_deterministic(8 * words, KEY)


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 10**6])
def test_chacha20_of_any_length(size: int) -> None:
    """Bytes that are no whole number of words: the two libraries agree on them too."""
    encryptor = prg._encryptor(KEY)
    assert encryptor.update(bytes(size)) == randombytes_deterministic(size, KEY)


def test_a_known_answer(library: str) -> None:
    # Of `openssl enc -chacha20 -K 0001..1f -iv 000000004c6962736f6469756d445247` on zeros.
    assert stream(KEY, 2).astype("<u8").tobytes().hex() == "0d8e6cc68715648926732e7ea73250cf"


@pytest.mark.parametrize("words", [1, 5, 40_000])
def test_what_was_added_is_taken_away_again(library: str, words: int) -> None:
    before = np.random.default_rng(0).integers(0, 1 << 64, words, dtype=np.uint64)
    now = before.copy()
    add_mask(now, KEY)
    assert (now != before).any()
    add_mask(now, KEY, negate=True)
    assert (now == before).all()


@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 65, 130])
def test_many_streams_at_once_are_one_after_the_other(library: str, count: int) -> None:
    keys = [bytes([i]) * 32 for i in range(count)]
    at_once, one_by_one = np.zeros(20_000, dtype=np.uint64), np.zeros(20_000, dtype=np.uint64)
    add_masks(at_once, iter(keys))
    for key in keys:
        add_mask(one_by_one, key)
    assert (at_once == one_by_one).all()
    add_masks(at_once, keys, negate=True)
    assert not at_once.any()


def test_a_part_of_a_longer_vector_is_masked_in_place(library: str) -> None:
    whole = np.zeros(100, dtype=np.uint64)
    add_mask(whole[20:30], KEY)
    assert (whole[20:30] == stream(KEY, 10)).all()
    assert not whole[:20].any()
    assert not whole[30:].any()


@pytest.mark.parametrize("size", [0, 4, 16, 31, 33, 64])
def test_a_key_of_another_length_is_refused(library: str, size: int) -> None:
    words = np.zeros(4, dtype=np.uint64)
    with pytest.raises(ValueError, match=f"{size} bytes"):
        add_mask(words, bytes(size))
    assert not words.any()


@pytest.mark.parametrize("bit", [0, 7, 31, 32, 100, 255])
def test_one_bit_of_the_key_changes_half_of_the_stream(bit: int) -> None:
    """A seed folded to 32 bits, as elsewhere, would give the same stream for bits 32 apart that change together."""
    changed = bytearray(KEY)
    changed[bit // 8] ^= 1 << bit % 8
    folded = bytearray(changed)
    folded[(bit // 8 + 4) % 32] ^= 1 << bit % 8
    bits = 64 * 4096
    for other in (bytes(changed), bytes(folded)):
        differing = int(np.unpackbits((stream(KEY, 4096) ^ stream(other, 4096)).view(np.uint8)).sum())
        assert abs(differing - bits / 2) < 5 * math.sqrt(bits) / 2


def test_words_are_uniform() -> None:
    """Every byte value is as frequent as any other, at each place in a word: no residue is left out."""
    words = 1 << 16
    columns = stream(KEY, words).astype("<u8").view(np.uint8).reshape(words, 8)
    for place in range(8):
        counts = np.bincount(columns[:, place], minlength=256)
        chi_square = float(((counts - words / 256) ** 2 / (words / 256)).sum())
        # 255 degrees of freedom: mean 255, standard deviation 22.6.
        assert 255 - 5 * 22.6 < chi_square < 255 + 5 * 22.6
    ones = np.array([int(((stream(KEY, words) >> np.uint64(bit)) & np.uint64(1)).sum()) for bit in range(64)])
    assert (abs(ones - words / 2) < 5 * math.sqrt(words) / 2).all()


def test_openssl_is_loaded_by_whoever_masks_and_by_nobody_else() -> None:
    """In a process of its own: this one has loaded everything already."""
    code = (
        "import sys, numpy, fleetfed.shared.secure.split, fleetfed.shared.secure.prg as prg\n"
        "print('cryptography' in sys.modules)\n"
        "prg.add_mask(numpy.zeros(4, dtype=numpy.uint64), bytes(32))\n"
        "print('cryptography' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
