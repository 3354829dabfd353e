from __future__ import annotations

import dataclasses
import logging
import os
import ssl
from datetime import UTC, datetime
from pathlib import Path

import pytest
from fleetfed_testing.brokers import FleetPki

from fleetfed.cloud_coordinator.keys.pki import Listener
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.mqtt.tls import TlsFiles, client_context


@pytest.fixture
def files(fleet_pki: FleetPki, tmp_path: Path) -> TlsFiles:
    """Copies that a test may spoil."""
    source = fleet_pki.client("d-tls")
    made = TlsFiles(tmp_path / "ca.crt", tmp_path / "d.crt", tmp_path / "d.key")
    for old, new in ((source.ca, made.ca), (source.cert, made.cert), (source.key, made.key)):
        new.write_bytes(old.read_bytes())
        new.chmod(0o600)
    return made


def test_context_checks_the_server(files: TlsFiles, caplog: pytest.LogCaptureFixture) -> None:
    context = client_context(files)
    assert context.check_hostname
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert [each["subject"][2][0][1] for each in context.get_ca_certs()] == ["demo infra CA"]
    assert not caplog.records


@pytest.mark.parametrize("name", ["ca", "cert", "key"])
@pytest.mark.parametrize("fault", ["missing", "empty", "garbage", "directory"])
def test_fault_names_the_file(files: TlsFiles, name: str, fault: str) -> None:
    path: Path = getattr(files, name)
    path.unlink()
    match fault:
        case "empty":
            path.touch()
        case "garbage":
            path.write_text("not a certificate\n")
        case "directory":
            path.mkdir()
    with pytest.raises(ConfigError, match=path.name):
        client_context(files)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_key_is_told(files: TlsFiles) -> None:
    files.key.chmod(0)
    with pytest.raises(ConfigError, match=r"d\.key.*permissions"):
        client_context(files)


def test_key_of_another_certificate_is_refused(files: TlsFiles, fleet_pki: FleetPki) -> None:
    with pytest.raises(ConfigError, match=r"d\.key"):
        client_context(dataclasses.replace(files, cert=fleet_pki.client("d-other").cert))


def test_key_open_to_others_is_warned_about(files: TlsFiles, caplog: pytest.LogCaptureFixture) -> None:
    files.key.chmod(0o640)
    with caplog.at_level(logging.WARNING):
        client_context(files)
    assert "chmod 600" in caplog.text
    assert "040" in caplog.text


def test_revocation_list_is_checked(files: TlsFiles, fleet_pki: FleetPki, tmp_path: Path) -> None:
    crl = fleet_pki.authority.write_crl(now=datetime.now(UTC))[Listener.CLOUD]
    context = client_context(dataclasses.replace(files, crl=crl))
    assert context.verify_flags & ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
    (tmp_path / "crl.pem").write_text("nothing\n")
    with pytest.raises(ConfigError, match=r"crl\.pem"):
        client_context(dataclasses.replace(files, crl=tmp_path / "crl.pem"))
