"""Who is certified and who is not: each refusal for its reason, and nothing has changed after it."""

from __future__ import annotations

import dataclasses
import os
import ssl

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID
from fleetfed_testing.enrolment import NOW, Bench, sealed

from fleetfed.cloud_coordinator.enroll.enroller import DAY, Enroller
from fleetfed.cloud_coordinator.enroll.lists import list_of
from fleetfed.device import csr, enroll
from fleetfed.shared.errors import ConfigError, RejectReason, RemoteProtocolError, StorageError
from fleetfed.shared.trust import enrolment
from fleetfed.shared.trust.certificates import SERIALS, Certificate, Role, issue
from fleetfed.shared.trust.enrolment import ANSWER, REQUEST, parse_token
from fleetfed.shared.trust.identity import Identity
from fleetfed.shared.trust.keys import SigningKey
from fleetfed.shared.wire.enrolment import MAX_REQUEST, SPENT_ALL, Purpose
from fleetfed.shared.wire.envelope import MessageKind
from fleetfed.shared.wire.messages import Revocations


def secret(text: str) -> bytes:
    return parse_token(text)[1]


# --- What is granted -------------------------------------------------------------------------------------------------


def test_a_token_makes_a_device_that_everybody_believes(bench: Bench) -> None:
    identity = bench.enrol("d1")
    certificate = bench.verifier().certificate(identity.encoded_certificate, now=NOW)
    own = bench.enroller.identity.certificate
    assert (certificate.role, certificate.owner, certificate.site) == (Role.DEVICE, "ward-3", "north")
    assert certificate.not_after - certificate.not_before == 30 * DAY
    assert certificate.serial // SERIALS == own.serial
    assert certificate.id.startswith("d-")
    assert Identity.load(bench.path / "d1", role=Role.DEVICE) == identity
    assert not (bench.path / "d1" / enroll.PENDING).exists()


def test_serials_of_both_authorities_never_meet(bench: Bench) -> None:
    serials = [bench.enrol(f"d{n}").certificate.serial for n in range(3)]
    assert serials == [serials[0], serials[0] + 1, serials[0] + 2]
    assert max(member.serial for member in bench.keyring.members) < SERIALS <= serials[0]


def test_the_tls_certificate_is_for_the_devices_own_key_and_in_the_log(bench: Bench) -> None:
    identity = bench.enrol("d1", device="d-07")
    tls = bench.path / "d1" / "tls"
    certificate = x509.load_pem_x509_certificate((tls / "cert.pem").read_bytes())
    assert certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "d-07" == identity.certificate.id
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_cert_chain(tls / "cert.pem", tls / "key.pem")
    assert (tls / "key.pem").stat().st_mode & 0o777 == 0o600
    assert certificate.fingerprint(hashes.SHA256()) in bench.enroller.log()[0]


def test_a_request_for_a_p256_key_is_as_good(bench: Bench) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    der = request.public_bytes(serialization.Encoding.DER)
    bench.enroller.answer(sealed(SigningKey.generate(), secret(bench.token()), tls_request=der), now=NOW)


def test_an_answer_that_was_lost_comes_again_byte_for_byte(bench: Bench) -> None:
    token = bench.token()
    request = bench.request("d1", token)
    first = bench.enroller.answer(request, now=NOW)
    bench.enrol("d2")
    bench.reopen()
    assert bench.request("d1", token, now=NOW + 5) == request
    assert bench.enroller.answer(request, now=NOW + 1000) == first
    assert len(bench.enroller.log()) == 2
    assert enroll.take(bench.path / "d1", first).certificate.owner == "ward-3"


def test_a_crash_before_the_commit_leaves_nothing_and_the_token_is_still_good(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = bench.request("d1", bench.token())
    before = bench.facts()

    def power_cut(*_: object) -> None:
        raise StorageError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr("fleetfed.cloud_coordinator.enroll.store.Store.add_answer", power_cut)
        with pytest.raises(StorageError):
            bench.enroller.answer(request, now=NOW)
    assert bench.facts() == before
    bench.enroller.answer(request, now=NOW)
    assert len(bench.enroller.log()) == 1


def test_two_processes_share_one_register(bench: Bench) -> None:
    other = Enroller.open(bench.settings)
    try:
        token = other.create_token(owner="ward-3", site="north", lifetime=DAY, now=NOW).text
        bench.enrol("d1", token=token)
        request = bench.request("d2", bench.token())
        other.answer(request, now=NOW)
        assert [each.id for each, _ in bench.enroller.devices()] == [each.id for each, _ in other.devices()]
        assert bench.enroller.directory() == other.directory()
    finally:
        other.close()


# --- Tokens ----------------------------------------------------------------------------------------------------------


def test_a_token_is_spent_by_its_first_use(bench: Bench) -> None:
    token = bench.token()
    bench.enrol("d1", token=token)
    assert bench.refusal(bench.request("d2", token)) is RejectReason.SPENT_TOKEN


def test_a_token_that_nobody_gave_out(bench: Bench) -> None:
    assert bench.refusal(sealed(SigningKey.generate(), bytes(16))) is RejectReason.BAD_TOKEN
    assert bench.refusal(sealed(SigningKey.generate(), b"")) is RejectReason.BAD_TOKEN


def test_a_token_too_late(bench: Bench) -> None:
    request = bench.request("d1", bench.token(lifetime=1000))
    assert bench.refusal(request, now=NOW + 1000) is RejectReason.EXPIRED
    bench.enroller.answer(request, now=NOW + 999)


def test_a_token_that_was_taken_back(bench: Bench) -> None:
    made = bench.enroller.create_token(owner="ward-3", site="north", lifetime=DAY, now=NOW)
    bench.enroller.revoke_token(made.token.label, now=NOW)
    assert bench.refusal(bench.request("d1", made.text)) is RejectReason.BAD_TOKEN
    with pytest.raises(ConfigError):
        bench.enroller.revoke_token(made.token.label, now=NOW)


def test_a_token_of_another_owner(bench: Bench) -> None:
    token = secret(bench.token(owner="ward-4"))
    assert bench.refusal(sealed(SigningKey.generate(), token, owner="ward-3")) is RejectReason.WRONG_OWNER


def test_only_hashes_of_tokens_are_kept(bench: Bench) -> None:
    token = secret(bench.token())
    for path in (bench.folder / "state").iterdir():
        assert token not in path.read_bytes()


@pytest.mark.parametrize(
    "wish",
    [{"site": "_"}, {"owner": ""}, {"owner": "Ward 3"}, {"site": "no/where"}, {"device": "g-north"}, {"device": "d/1"}],
)
def test_tokens_that_cannot_be(bench: Bench, wish: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        bench.token(**wish)


# --- Keys ------------------------------------------------------------------------------------------------------------


def test_a_request_signed_by_another_key_than_the_one_it_is_for(bench: Bench) -> None:
    request = bytearray(sealed(SigningKey.generate(), secret(bench.token())))
    request[4:36] = SigningKey.generate().public
    assert bench.refusal(bytes(request)) is RejectReason.BAD_SIGNATURE


def test_a_tls_request_that_its_own_key_did_not_sign(bench: Bench) -> None:
    der = bytearray(csr.request(bytes(32), "d"))
    der[-1] ^= 1
    request = sealed(SigningKey.generate(), secret(bench.token()), tls_request=bytes(der))
    assert bench.refusal(request) is RejectReason.BAD_SIGNATURE


def test_a_tls_request_that_is_none_or_for_a_weak_key(bench: Bench) -> None:
    weak = rsa.generate_private_key(65537, 1024)
    built = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(weak, hashes.SHA256())
    for der in (b"\x30\x00", built.public_bytes(serialization.Encoding.DER)):
        request = sealed(SigningKey.generate(), secret(bench.token()), tls_request=der)
        assert bench.refusal(request) is RejectReason.MALFORMED


def test_the_same_key_under_a_second_token_is_a_clone(bench: Bench) -> None:
    key = SigningKey.generate()
    bench.enroller.answer(sealed(key, secret(bench.token())), now=NOW)
    assert bench.refusal(sealed(key, secret(bench.token()), hardware="SN-2")) is RejectReason.CLONED_KEY


def test_a_key_stays_known_after_its_device_was_revoked(bench: Bench) -> None:
    identity = bench.enrol("d1")
    bench.enroller.revoke([identity.certificate.id], now=NOW)
    assert bench.refusal(sealed(identity.key, secret(bench.token()))) is RejectReason.CLONED_KEY


def test_the_same_tls_key_in_two_devices_is_a_clone(bench: Bench) -> None:
    der = csr.request(bytes(32), "d")
    bench.enroller.answer(sealed(SigningKey.generate(), secret(bench.token()), tls_request=der), now=NOW)
    again = sealed(SigningKey.generate(), secret(bench.token()), tls_request=der, hardware="SN-2")
    assert bench.refusal(again) is RejectReason.CLONED_KEY


def test_one_piece_of_hardware_has_one_device_and_a_new_one_begins_as_spent(bench: Bench) -> None:
    first = bench.enrol("d1")
    second = sealed(SigningKey.generate(), secret(bench.token()), hardware="SN-d1")
    assert bench.refusal(second) is RejectReason.CLONED_KEY
    bench.enroller.revoke([first.certificate.id], now=NOW)
    answer = ANSWER.open(bench.enroller.answer(second, now=NOW)).body
    assert first.spent == 0
    assert answer.spent == SPENT_ALL
    assert answer.id != first.certificate.id


def test_an_operator_who_knows_better_says_what_is_spent(bench: Bench) -> None:
    bench.enroller.revoke([bench.enrol("d1").certificate.id], now=NOW)
    request = sealed(SigningKey.generate(), secret(bench.token(spent=40)), hardware="SN-d1")
    assert ANSWER.open(bench.enroller.answer(request, now=NOW)).body.spent == 40
    assert bench.enrol("d3", spent=7).spent == 7


def test_an_id_is_given_out_once(bench: Bench) -> None:
    one, two = bench.token(device="d-07"), bench.token(device="d-07")
    bench.enrol("d1", token=one)
    assert bench.refusal(bench.request("d2", two)) is RejectReason.CLONED_KEY
    with pytest.raises(ConfigError, match="never given out twice"):
        bench.token(device="d-07")


# --- Sizes and fleets ------------------------------------------------------------------------------------------------


def test_a_request_that_is_too_large(bench: Bench) -> None:
    assert bench.refusal(REQUEST.magic + bytes(MAX_REQUEST)) is RejectReason.TOO_LARGE


def test_a_request_of_another_fleet(bench: Bench) -> None:
    request = sealed(SigningKey.generate(), secret(bench.token()), fleet="other")
    assert bench.refusal(request) is RejectReason.WRONG_FLEET


# --- Renewal ---------------------------------------------------------------------------------------------------------


def test_a_renewal_needs_no_token_and_changes_nothing_but_the_end(bench: Bench) -> None:
    before = bench.enrol("d1", url="https://localhost")
    later = NOW + 16 * DAY
    after = bench.renew("d1", now=later)
    assert after.certificate.not_after == later + 30 * DAY
    assert after.certificate.serial > before.certificate.serial
    same = {"serial": 0, "not_before": 0, "not_after": 1}
    assert dataclasses.replace(after.certificate, **same) == dataclasses.replace(before.certificate, **same)
    assert Identity.load(bench.path / "d1").certificate == after.certificate
    verifier = bench.verifier()
    for each in (before, after):
        verifier.certificate(each.encoded_certificate, now=later)


def test_a_renewal_whose_answer_was_lost_is_not_issued_twice(bench: Bench) -> None:
    bench.enrol("d1", url="https://localhost")
    later = NOW + 16 * DAY
    request = enroll.renewal_request(bench.path / "d1", now=later)
    first = bench.enroller.answer(request, now=later)
    assert bench.enroller.answer(request, now=later + 5) == first
    # The device has forgotten that request and makes another one.
    again = bench.renew("d1", now=later + 1000)
    assert again.certificate.serial == serial_in(first)
    assert len(bench.enroller.log()) == 2


def serial_in(data: bytes) -> int:
    sealed_ = ANSWER.open(data)
    return enroll.certificates.verify(sealed_.body.certificate, sealed_.key).serial


def test_a_revoked_device_renews_nothing(bench: Bench) -> None:
    identity = bench.enrol("d1", url="https://localhost")
    bench.enroller.revoke([identity.certificate.id], now=NOW)
    request = enroll.renewal_request(bench.path / "d1", now=NOW + 16 * DAY)
    assert bench.refusal(request, now=NOW + 16 * DAY) is RejectReason.REVOKED


def test_a_key_that_was_never_enrolled_renews_nothing(bench: Bench) -> None:
    assert bench.refusal(sealed(SigningKey.generate(), b"", purpose=Purpose.RENEW)) is RejectReason.NOT_ENROLLED


def test_who_sleeps_for_too_long_enrols_anew(bench: Bench) -> None:
    bench.enrol("d1", url="https://localhost")
    last = NOW + 90 * DAY
    request = enroll.renewal_request(bench.path / "d1", now=last)
    assert bench.refusal(request, now=last + 1) is RejectReason.NOT_ENROLLED
    bench.enroller.answer(request, now=last)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"owner": "ward-4"}, RejectReason.WRONG_OWNER),
        ({"tls_request": csr.request(b"x" * 32, "d")}, RejectReason.CLONED_KEY),
        ({"fleet": "other"}, RejectReason.WRONG_FLEET),
    ],
)
def test_a_renewal_that_would_change_something(bench: Bench, changes: dict[str, object], reason: RejectReason) -> None:
    identity = bench.enrol("d1")
    seed = csr.seed_of((bench.path / "d1" / "tls" / "key.pem").read_bytes())
    honest = {"tls_request": csr.request(seed, "d"), "purpose": Purpose.RENEW}
    request = sealed(identity.key, b"", **{**honest, **changes})  # type: ignore[arg-type]
    assert bench.refusal(request, now=NOW + 16 * DAY) is reason


# --- Revocation ------------------------------------------------------------------------------------------------------


def test_all_certificates_of_a_revoked_device_are_on_the_list(bench: Bench) -> None:
    first = bench.enrol("d1", url="https://localhost").certificate
    second = bench.renew("d1", now=NOW + 16 * DAY).certificate
    other = bench.enrol("d2").certificate
    _, message = bench.enroller.revoke([first.id], now=NOW + 17 * DAY)
    assert message is not None
    body, _, by = bench.verifier().open(message, Revocations, kind=MessageKind.REVOCATIONS, now=NOW)
    assert (by.role, body.version, body.serials) == (Role.ENROLLER, 1, (first.serial, second.serial))
    crl = x509.load_pem_x509_crl(bench.enroller.crl(now=NOW + 17 * DAY))
    assert len(list(crl)) == 2
    assert bench.enroller.directory().revocations == 1
    with pytest.raises(ConfigError, match="revoked already"):
        bench.enroller.revoke([str(first.serial)], now=NOW)
    _, message = bench.enroller.revoke([str(other.serial)], now=NOW + 17 * DAY)
    assert list_of(message or b"").serials == (first.serial, second.serial, other.serial)


def test_a_list_keeps_what_others_revoked_and_goes_above_their_version(bench: Bench) -> None:
    theirs = Revocations(version=7, serials=(3, 9))
    identity = bench.enrol("d1")
    _, message = bench.enroller.revoke([identity.certificate.id], now=NOW, others=(theirs,))
    assert list_of(message or b"") == Revocations(version=8, serials=(3, 9, identity.certificate.serial))
    _, again = bench.enroller.revoke([], now=NOW + 1, others=(theirs,))
    assert again == message


def test_a_gateway_cannot_be_revoked_here(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="not enrolled here"):
        bench.enroller.revoke(["g-north"], now=NOW)
    with pytest.raises(ConfigError, match="not enrolled here"):
        bench.enroller.revoke(["3"], now=NOW)


# --- The right itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", [role for role in Role if role is not Role.DEVICE])
def test_no_verifier_believes_another_role_that_the_service_certified(bench: Bench, role: Role) -> None:
    key = SigningKey.generate()
    certificate = Certificate(
        serial=SERIALS * bench.enroller.identity.certificate.serial + 99,
        role=role,
        fleet="demo",
        id="g-evil",
        site="north",
        not_before=NOW,
        not_after=NOW + DAY,
        public_key=key.public,
    )
    encoded = issue(certificate, bench.enroller.identity.key)
    gateway = Identity.load(bench.keyring.identity_folder("g-north"))
    for verifier in (bench.verifier(), gateway.verifier()):
        with pytest.raises(RemoteProtocolError) as caught:
            verifier.certificate(encoded, now=NOW)
        assert caught.value.reason is RejectReason.BAD_CERTIFICATE


def test_who_was_not_told_of_the_service_believes_none_of_its_devices(bench: Bench) -> None:
    coordinator = Identity.load(bench.keyring.identity_folder("coordinator"))
    encoded = bench.enrol("d1").encoded_certificate
    with pytest.raises(RemoteProtocolError) as caught:
        coordinator.verifier().certificate(encoded, now=NOW)
    assert caught.value.reason is RejectReason.BAD_CERTIFICATE
    told = dataclasses.replace(coordinator, enrollers=(bench.enroller.identity.key.public,))
    told.verifier().certificate(encoded, now=NOW)
    assert bench.enroller.entry() == enrolment.enroller(bench.enroller.identity.key.public)


def test_randomness_makes_the_token(bench: Bench) -> None:
    seen = {bench.token() for _ in range(20)}
    assert len(seen) == 20
    assert os.urandom(16) not in {secret(each) for each in seen}
