from __future__ import annotations

import itertools
import stat
from pathlib import Path

import pytest

from fleetfed.shared.errors import ConfigError, StorageError
from fleetfed.shared.trust.certificates import Certificate, Role, issue
from fleetfed.shared.trust.identity import CERTIFICATE_FILE, FLEET_FILE, KEY_FILE, Identity
from fleetfed.shared.trust.keys import SigningKey
from fleetfed.shared.trust.sequence import SequenceFile


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    authority, key = SigningKey.generate(), SigningKey.generate()
    certificate = Certificate(
        serial=1, role=Role.DEVICE, fleet="f", id="d-1", site="s", not_before=0, not_after=1, public_key=key.public
    )
    Identity(
        key=key,
        certificate=certificate,
        encoded_certificate=issue(certificate, authority),
        authority_key=authority.public,
    ).save(tmp_path)
    return tmp_path


def test_an_identity_survives_the_disk_and_its_key_is_private(saved: Path) -> None:
    identity = Identity.load(saved, role=Role.DEVICE)
    assert identity.certificate.id == "d-1"
    assert identity.key.public == identity.certificate.public_key
    assert stat.S_IMODE((saved / KEY_FILE).stat().st_mode) == 0o600
    assert identity.key.public.hex() not in repr(identity.key)


@pytest.mark.parametrize("name", [FLEET_FILE, KEY_FILE, CERTIFICATE_FILE])
def test_a_missing_file_is_named_with_the_cure(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(ConfigError, match=rf"{name}.*fleetfed keys issue"):
        Identity.load(saved)


def test_a_key_that_others_can_read_is_refused(saved: Path) -> None:
    (saved / KEY_FILE).chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        Identity.load(saved)


def test_another_key_than_the_certificate_names_is_refused(saved: Path) -> None:
    SigningKey.generate().save(saved / KEY_FILE)
    with pytest.raises(ConfigError, match="another key"):
        Identity.load(saved)


def test_a_certificate_of_another_authority_is_refused(saved: Path) -> None:
    text = (saved / FLEET_FILE).read_text()
    authority = Identity.load(saved).authority_key.hex()
    (saved / FLEET_FILE).write_text(text.replace(authority, SigningKey.generate().public.hex()))
    with pytest.raises(ConfigError, match="another authority"):
        Identity.load(saved)


def test_the_wrong_role_is_refused_by_name(saved: Path) -> None:
    with pytest.raises(ConfigError, match="has the role device, this program needs gateway"):
        Identity.load(saved, role=Role.GATEWAY)


def test_a_sequence_never_repeats_across_crashes(tmp_path: Path) -> None:
    path = tmp_path / "sequence"
    seen: list[int] = []
    for _ in range(4):
        sequence = SequenceFile(path)  # a new process, the old one was killed
        seen += [sequence() for _ in range(1500)]
    assert all(a < b for a, b in itertools.pairwise(seen))


def test_a_damaged_sequence_is_never_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "sequence"
    path.write_text("garbage")
    with pytest.raises(StorageError, match="garbage"):
        SequenceFile(path)
