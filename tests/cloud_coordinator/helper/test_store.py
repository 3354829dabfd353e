"""What a helper keeps is there after a crash; what it destroys is nowhere."""

from __future__ import annotations

import secrets
import stat
from pathlib import Path

import pytest

from fleetfed.cloud_coordinator.helper.events import Claim, Key
from fleetfed.cloud_coordinator.helper.store import Store
from fleetfed.shared.errors import StorageError
from fleetfed.shared.secure.box import SealSecret
from fleetfed.shared.wire.envelope import Digest
from fleetfed.shared.wire.masking import HYBRID, SEALED_BOX


def new_key(store: Store, suite: int = SEALED_BOX) -> tuple[Key, SealSecret]:
    secret = SealSecret.from_bytes(secrets.token_bytes(32), suite)
    key = Key(public=secret.public, message=b"signed" + secret.public, issued=1, expires=2)
    store.add_key(key, secret)
    return key, secret


def claim(key: Key, *, round: int = 1, gateway: str = "g-north") -> Claim:
    return Claim(
        question=Digest(secrets.token_bytes(32)),
        round=round,
        plan=Digest(b"p" * 32),
        gateway=gateway,
        key=key.public,
        devices=frozenset({f"{gateway}-1", f"{gateway}-2"}),
    )


def test_a_secret_is_of_the_suite_of_its_public_key(tmp_path: Path) -> None:
    store = Store(tmp_path / "helper.db")
    for suite in (SEALED_BOX, HYBRID):
        key, secret = new_key(store, suite)
        found = store.secret(key.public)
        assert (found.suite, found.public) == (suite, secret.public)


def test_everything_is_there_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "helper.db")
    key, secret = new_key(store)
    claims = [claim(key), claim(key, gateway="g-south"), claim(key, round=2)]
    for number, each in enumerate(claims):
        store.add_answer(each, b"answer %d" % number)
    # No close: as after a kill.
    again = Store(tmp_path / "helper.db")
    assert again.keys() == [key]
    assert again.secret(key.public).encode() == secret.encode()
    assert sorted(again.claims(), key=str) == sorted(claims, key=str)
    assert again.answer(1, "g-south") == b"answer 1"
    assert again.answer(2, "g-north") == b"answer 2"
    again.close()
    store.close()


def test_an_answer_is_stored_whole_or_not_at_all(tmp_path: Path) -> None:
    store = Store(tmp_path / "helper.db")
    key, _ = new_key(store)
    store.add_answer(claim(key), b"first")
    again = claim(key, gateway="g-south")
    stolen = Claim(
        question=again.question,
        round=1,
        plan=again.plan,
        gateway="g-south",
        key=key.public,
        devices=frozenset({"g-north-1"}),
    )
    with pytest.raises(StorageError):
        store.add_answer(stolen, b"second")
    assert [each.gateway for each in store.claims()] == ["g-north"]
    with pytest.raises(StorageError, match="missing"):
        store.answer(1, "g-south")
    store.close()


def test_a_destroyed_secret_is_in_no_file(tmp_path: Path) -> None:
    store = Store(tmp_path / "helper.db")
    old, secret = new_key(store)
    new, kept = new_key(store)
    store.add_answer(claim(old), b"an answer of the old key")
    store.add_answer(claim(new, round=2), b"an answer of the new key")

    def on_disk(data: bytes) -> bool:
        return any(data in path.read_bytes() for path in tmp_path.iterdir())

    assert on_disk(secret.encode())
    store.destroy([old.public])
    assert not on_disk(secret.encode())
    assert not on_disk(b"an answer of the old key")
    assert on_disk(kept.encode())
    assert [each.round for each in store.claims()] == [2]
    with pytest.raises(StorageError, match="missing"):
        store.secret(old.public)
    store.close()


def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "helper.db")
    new_key(store)
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    store.close()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "helper.db"
    path.write_bytes(b"nothing that SQLite knows" * 50)
    with pytest.raises(StorageError, match=r"helper\.db"):
        Store(path)
