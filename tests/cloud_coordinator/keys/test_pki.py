"""Certificates are judged by OpenSSL in real handshakes, not by reading them back."""

from __future__ import annotations

import ssl
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fleetfed.cloud_coordinator.keys.pki import Listener, Pki, Role
from fleetfed.shared.errors import ConfigError, LocalProtocolError, StorageError
from fleetfed.shared.mqtt.tls import TlsFiles, client_context

NOW = datetime.now(UTC)


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki.create(tmp_path / "ca", "demo", now=NOW)


def handshake(
    pki: Pki, server: TlsFiles, client: TlsFiles, *, listener: Listener = Listener.SITE, host: str = "broker.example"
) -> str:
    """Connect ``client`` to ``server`` in memory; returns the client's common name as the server sees it.

    Raises:
        ssl.SSLError: one of them refused.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server.cert, server.key)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(pki.bundle(listener))
    context.load_verify_locations(pki.crl(listener))
    context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    left = client_context(client).wrap_bio(to_client, to_server, server_hostname=host)
    right = context.wrap_bio(to_server, to_client, server_side=True)
    done = [False, False]
    while not all(done):
        for index, side in enumerate((left, right)):
            if not done[index]:
                try:
                    side.do_handshake()
                    done[index] = True
                except ssl.SSLWantReadError:
                    pass
    names = dict(field[0] for field in right.getpeercert()["subject"])
    name: str = names["commonName"]
    return name


def parsed(files: TlsFiles) -> x509.Certificate:
    return x509.load_pem_x509_certificate(files.cert.read_bytes())


def test_members_are_known_by_their_common_name(pki: Pki, tmp_path: Path) -> None:
    server = pki.issue_server("broker", ["broker.example"], tmp_path / "broker", now=NOW)
    for name, role in (("d-07", Role.DEVICE), ("g-north", Role.GATEWAY), ("alice", Role.OPERATOR)):
        client = pki.issue_client(name, role, tmp_path / name, now=NOW)
        assert handshake(pki, server, client) == name


def test_cloud_listener_refuses_devices_even_with_a_chain_of_their_own(pki: Pki, tmp_path: Path) -> None:
    server = pki.issue_server("broker", ["broker.example"], tmp_path / "broker", now=NOW)
    gateway = pki.issue_client("g-north", Role.GATEWAY, tmp_path / "g", now=NOW)
    device = pki.issue_client("d-07", Role.DEVICE, tmp_path / "d", now=NOW)
    assert handshake(pki, server, gateway, listener=Listener.CLOUD) == "g-north"
    with pytest.raises(ssl.SSLError):
        handshake(pki, server, device, listener=Listener.CLOUD)
    device.cert.write_bytes(device.cert.read_bytes() + (pki.directory / "devices.crt").read_bytes())
    with pytest.raises(ssl.SSLError):
        handshake(pki, server, device, listener=Listener.CLOUD)


def test_server_is_known_by_the_hosts_it_was_issued_for(pki: Pki, tmp_path: Path) -> None:
    server = pki.issue_server("broker", ["broker.example", "10.0.0.5", "::1"], tmp_path / "broker", now=NOW)
    client = pki.issue_client("d-07", Role.DEVICE, tmp_path / "d", now=NOW)
    for host in ("broker.example", "10.0.0.5", "::1"):
        handshake(pki, server, client, host=host)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(pki, server, client, host="10.0.0.6")


def test_client_cannot_play_broker(pki: Pki, tmp_path: Path) -> None:
    client = pki.issue_client("broker", Role.GATEWAY, tmp_path / "g", now=NOW)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(pki, client, pki.issue_client("d-07", Role.DEVICE, tmp_path / "d", now=NOW), host="broker")


def test_server_cannot_play_client(pki: Pki, tmp_path: Path) -> None:
    server = pki.issue_server("broker", ["broker.example"], tmp_path / "broker", now=NOW)
    with pytest.raises(ssl.SSLError):
        handshake(pki, server, server)


def test_revoked_is_refused_and_its_successor_is_not(pki: Pki, tmp_path: Path) -> None:
    server = pki.issue_server("broker", ["broker.example"], tmp_path / "broker", now=NOW)
    old = pki.issue_client("d-07", Role.DEVICE, tmp_path / "old", now=NOW)
    other = pki.issue_client("d-08", Role.DEVICE, tmp_path / "other", now=NOW)
    assert handshake(pki, server, old) == "d-07"
    revoked = pki.revoke("d-07", now=NOW)
    assert [each.serial for each in revoked] == [parsed(old).serial_number]
    assert handshake(pki, server, old) == "d-07", "revocation acts through the list alone"
    new = pki.issue_client("d-07", Role.DEVICE, tmp_path / "new", now=NOW)
    pki.write_crl(now=NOW)
    with pytest.raises(ssl.SSLError):
        handshake(pki, server, old)
    assert handshake(pki, server, new) == "d-07"
    assert handshake(pki, server, other) == "d-08"


def test_ledger_survives_reopening_and_a_torn_line(pki: Pki, tmp_path: Path) -> None:
    first = pki.issue_client("d-07", Role.DEVICE, tmp_path / "1", now=NOW)
    pki.issue_client("g-1", Role.GATEWAY, tmp_path / "2", now=NOW)
    pki.revoke(parsed(first).serial_number, now=NOW)
    with (pki.directory / "ledger.jsonl").open("a") as file:
        file.write('{"issued": "12')
    again = Pki.open(pki.directory)
    assert again.fleet == "demo"
    assert again.issued() == pki.issued()
    assert [(each.name, each.revoked) for each in again.issued()] == [("d-07", NOW), ("g-1", None)]
    again.issue_client("d-08", Role.DEVICE, tmp_path / "3", now=NOW)
    assert [each.name for each in Pki.open(pki.directory).issued()] == ["d-07", "g-1", "d-08"]
    assert again.revoke("d-07", now=NOW) == []


def test_damaged_ledger_is_not_passed_over(pki: Pki, tmp_path: Path) -> None:
    pki.issue_client("d-07", Role.DEVICE, tmp_path / "1", now=NOW)
    path = pki.directory / "ledger.jsonl"
    path.write_bytes(b"{}\n" + path.read_bytes())
    with pytest.raises(StorageError, match="line 1"):
        Pki.open(pki.directory)


def test_authorities_are_not_overwritten_unless_told(pki: Pki) -> None:
    before = {path.name: path.read_bytes() for path in pki.directory.iterdir()}
    with pytest.raises(ConfigError, match="already"):
        Pki.create(pki.directory, "demo", now=NOW)
    assert {path.name: path.read_bytes() for path in pki.directory.iterdir()} == before
    Pki.create(pki.directory, "demo", now=NOW, overwrite=True)
    assert (pki.directory / "infra.key").read_bytes() != before["infra.key"]


def test_keys_are_for_their_owner_alone(pki: Pki, tmp_path: Path) -> None:
    pki.issue_client("d-07", Role.DEVICE, tmp_path / "d", now=NOW)
    keys = [*pki.directory.glob("*.key"), *(tmp_path / "d").glob("*.key")]
    assert len(keys) == 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}
    assert stat.S_IMODE((pki.directory / "ledger.jsonl").stat().st_mode) == 0o600
    assert stat.S_IMODE(pki.directory.stat().st_mode) == 0o700


def test_certificate_says_what_it_should(pki: Pki, tmp_path: Path) -> None:
    certificate = parsed(pki.issue_client("d-07", Role.DEVICE, tmp_path / "d", now=NOW, days=30))
    subject = {each.oid: each.value for each in certificate.subject}
    assert subject[NameOID.COMMON_NAME] == "d-07"
    assert subject[NameOID.ORGANIZATION_NAME] == "demo"
    assert subject[NameOID.ORGANIZATIONAL_UNIT_NAME] == "device"
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert certificate.not_valid_before_utc <= NOW
    assert abs(certificate.not_valid_after_utc - NOW - timedelta(days=30)) < timedelta(seconds=2)
    key = certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert isinstance(key.curve, ec.SECP256R1)


def test_nothing_outlives_its_authority(tmp_path: Path) -> None:
    pki = Pki.create(tmp_path / "ca", "demo", now=NOW, days=10)
    certificate = parsed(pki.issue_client("d-07", Role.DEVICE, tmp_path / "d", now=NOW, days=90))
    assert certificate.not_valid_after_utc <= NOW + timedelta(days=10)


def test_expired_leaves_the_list(pki: Pki, tmp_path: Path) -> None:
    pki.issue_client("d-07", Role.DEVICE, tmp_path / "d", now=NOW, days=1)
    pki.revoke("d-07", now=NOW)
    for later, count in ((NOW, 1), (NOW + timedelta(days=3), 0)):
        pem = pki.write_crl(now=later)[Listener.SITE].read_bytes()
        lists = [x509.load_pem_x509_crl(b"-----BEGIN" + part) for part in pem.split(b"-----BEGIN")[1:]]
        assert len(lists) == 2
        assert sum(len(each) for each in lists) == count


def request_for(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, name: str = "whoever") -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    )
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def test_request_gets_the_name_that_we_say(pki: Pki) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    pem = pki.sign_request("d-07", Role.DEVICE, request_for(key, "g-north"), now=NOW)
    certificate = x509.load_pem_x509_certificate(pem)
    assert certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "d-07"
    assert certificate.public_key() == key.public_key()
    assert [each.name for each in pki.issued()] == ["d-07"]


def test_bad_request_is_refused_and_not_in_the_ledger(pki: Pki) -> None:
    good = request_for(ec.generate_private_key(ec.SECP256R1()))
    der = bytearray(x509.load_pem_x509_csr(good).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    forged = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)
    for request in (
        b"nonsense",
        forged,
        request_for(ec.generate_private_key(ec.SECP384R1())),
        request_for(rsa.generate_private_key(65537, 2048)),
    ):
        with pytest.raises(LocalProtocolError):
            pki.sign_request("d-07", Role.DEVICE, request, now=NOW)
    assert pki.issued() == []


@pytest.mark.parametrize("name", ["", "D-1", "a/b", "a.b", "x" * 49])
def test_name_that_is_no_id_is_refused(pki: Pki, tmp_path: Path, name: str) -> None:
    with pytest.raises(LocalProtocolError):
        pki.issue_client(name, Role.DEVICE, tmp_path / "d", now=NOW)
    assert not (tmp_path / "d").exists()


def test_what_is_not_there_is_told(pki: Pki, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="infra"):
        Pki.open(tmp_path / "nowhere")
    with pytest.raises(LocalProtocolError, match="d-99"):
        pki.revoke("d-99", now=NOW)
    with pytest.raises(LocalProtocolError):
        pki.issue_server("broker", [], tmp_path / "b", now=NOW)
    (pki.directory / "infra.key").write_text("garbage")
    with pytest.raises(StorageError, match="infra"):
        Pki.open(pki.directory)
