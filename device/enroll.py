"""Enrolment and renewal from the device's side.

The keys are made here and never leave: only their public halves do, signed by their private ones. Everything is on disk
before it is sent, so a device that loses power or the answer asks again with the same bytes, and gets the same answer.

::

    identity/
      enrol.toml       where to renew, and what this hardware is called
      request.bin      a request whose answer has not come yet; holds the token, 0600

A renewal replaces two files, each whole, and neither needs the other: old and new ones are valid beside each other.
What was signed before carries its own certificate and stays good until that one ends.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from fleetfed.device import csr
from fleetfed.device.notes import NOTES, Notes
from fleetfed.shared.errors import ConfigError, FleetFedError, RejectReason, RemoteProtocolError
from fleetfed.shared.files import write_atomic
from fleetfed.shared.trust import certificates
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.trust.enrolment import ANSWER, HEAD, REQUEST, parse_token
from fleetfed.shared.trust.identity import FLEET_FILE, KEY_FILE, TLS_DIRECTORY, Identity
from fleetfed.shared.trust.keys import SigningKey
from fleetfed.shared.trust.merkle import included
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.enrolment import (
    MAX_ANSWER,
    MAX_ENTRY,
    MAX_REQUEST,
    EnrolAnswer,
    EnrolRequest,
    EntryKind,
    LogEntry,
    Purpose,
)
from fleetfed.shared.wire.envelope import digest

_log = logging.getLogger(__name__)

PENDING: Final = "request.bin"
PATHS: Final = {Purpose.ENROL: "/v1/enrol", Purpose.RENEW: "/v1/renew"}
_MACHINE_ID: Final = Path("/etc/machine-id")
_TIMEOUT: Final = 30.0


class NotReachedError(FleetFedError):
    """The service could not be asked, or gave no sensible answer; the same request may be sent again."""


def machine(given: str = "") -> str:
    """What this hardware is called: what was given, or a hash of the machine id, which itself is nobody's business.

    Raises:
        ConfigError: there is none.
    """
    if given:
        return given
    try:
        text = _MACHINE_ID.read_text().strip()
    except OSError:
        text = ""
    if not text:
        raise ConfigError(f"{_MACHINE_ID} says nothing: give --hardware, a serial number of this device for example")
    return hashlib.blake2b(text.encode(), digest_size=16, person=b"ff-machine").hexdigest()


# --- Asking ----------------------------------------------------------------------------------------------------------


def first_request(directory: Path, token: str, *, notes: Notes, now: int) -> bytes:
    """Make keys where there are none, and a request with a token; both are durable when this returns.

    Args:
        directory: the identity folder, made where it is missing.
        token: as a person typed it.
        notes: what to remember.
        now: unix milliseconds.

    Raises:
        ConfigError: the folder holds an identity already, or the token is none.
    """
    if (directory / FLEET_FILE).exists():
        raise ConfigError(
            f"{directory} holds an identity already; renew it with `fleetfed-device renew`, or take an empty folder"
        )
    try:
        owner, secret = parse_token(token)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    hardware = machine(notes.hardware)
    kept = _pending(directory)
    if kept is not None and (kept.token, kept.hardware) == (secret, hardware):
        # Its answer was lost: the same bytes get the same answer.
        return (directory / PENDING).read_bytes()
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    key, tls_seed = _keys(directory)
    request = REQUEST.close(
        EnrolRequest(
            purpose=Purpose.ENROL,
            owner=owner,
            hardware=hardware,
            tls_request=csr.request(tls_seed, owner),
            token=secret,
            nonce=os.urandom(16),
            issued_at=now,
        ),
        key,
    )
    notes.save(directory)
    write_atomic(directory / PENDING, request, mode=0o600)
    return request


def renewal_request(directory: Path, *, now: int) -> bytes:
    """Make a request to renew the identity in a folder, signed by its key; durable when this returns.

    Raises:
        ConfigError: there is no identity, or it was not enrolled.
    """
    identity = Identity.load(directory, role=Role.DEVICE)
    certificate = identity.certificate
    if not identity.issuer_key:
        raise ConfigError(f"{directory} was issued by the authority: `fleetfed keys issue` makes another one")
    hardware = machine(Notes.load(directory).hardware)
    _, tls_seed = _keys(directory)
    request = REQUEST.close(
        EnrolRequest(
            purpose=Purpose.RENEW,
            fleet=certificate.fleet,
            owner=certificate.owner,
            hardware=hardware,
            tls_request=csr.request(tls_seed, certificate.id),
            nonce=os.urandom(16),
            issued_at=now,
        ),
        identity.key,
    )
    write_atomic(directory / PENDING, request, mode=0o600)
    return request


def _pending(directory: Path) -> EnrolRequest | None:
    try:
        data = (directory / PENDING).read_bytes()
    except FileNotFoundError:
        return None
    try:
        return REQUEST.open(data).body
    except RemoteProtocolError:
        return None


def _keys(directory: Path) -> tuple[SigningKey, bytes]:
    """Both keys, made where they are missing."""
    path, tls_path = directory / KEY_FILE, directory / TLS_DIRECTORY / "key.pem"
    if not path.exists():
        SigningKey.generate().save(path)
    if not tls_path.exists():
        write_atomic(tls_path, csr.private_pem(os.urandom(32)), mode=0o600)
    try:
        return SigningKey.load(path), csr.seed_of(tls_path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{tls_path}: {error}; it was not made by `fleetfed-device enroll`") from error


def send(url: str, purpose: Purpose, request: bytes, *, ca: Path, timeout: float = _TIMEOUT) -> bytes:
    """Ask the service.

    Args:
        url: ``https://host:port``.
        purpose: what the request is for.
        request: sealed.
        ca: the authority that the service's certificate must be of; nothing else is trusted.
        timeout: seconds for each step.

    Raises:
        ConfigError: the URL or the file is wrong.
        RemoteProtocolError: the service refuses, and why.
        NotReachedError: it was not reached.
    """
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname or parts.query or parts.username:
        raise ConfigError(f"{url!r}: give https://HOST:PORT of the enrolment service")
    try:
        context = ssl.create_default_context(cafile=ca)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{ca}: {error}; copy the fleet's CA file there") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    connection = http.client.HTTPSConnection(parts.hostname, parts.port or 8443, timeout=timeout, context=context)
    try:
        connection.request(
            "POST",
            parts.path.rstrip("/") + PATHS[purpose],
            body=request,
            headers={"Content-Type": "application/octet-stream"},
        )
        response = connection.getresponse()
        body = response.read(MAX_ANSWER + 1)
    except ssl.SSLCertVerificationError as error:
        raise NotReachedError(f"{url}: its certificate is not of {ca} ({error.verify_message})") from error
    except (OSError, http.client.HTTPException) as error:
        raise NotReachedError(f"{url}: {error or type(error).__name__}") from error
    finally:
        connection.close()
    if response.status == http.client.OK:
        return body
    raise _refusal(url, response.status, body)


def _refusal(url: str, status: int, body: bytes) -> FleetFedError:
    try:
        table = json.loads(body)
        reason, detail = RejectReason(table["error"]), str(table["detail"])[:300]
    except (ValueError, KeyError, TypeError):
        return NotReachedError(f"{url}: status {status}")
    if reason is RejectReason.OVERLOADED:
        return NotReachedError(f"{url}: {detail}")
    return RemoteProtocolError(reason, detail)


# --- Taking the answer -----------------------------------------------------------------------------------------------


def take(directory: Path, data: bytes) -> Identity:
    """Check an answer and make it the folder's identity; a crash in between is mended by taking it again.

    Args:
        directory: the folder that the request was made in.
        data: the answer.

    Raises:
        ConfigError: the folder has no request that waits for an answer.
        RemoteProtocolError: the answer is not to that request, or is not right.
    """
    try:
        request = (directory / PENDING).read_bytes()
    except OSError as error:
        raise ConfigError(f"{directory} waits for no answer; begin with `fleetfed-device enroll`") from error
    asked = REQUEST.open(request)
    sealed = ANSWER.open(data)
    answer = sealed.body
    if answer.request != digest(request):
        raise RemoteProtocolError(RejectReason.WRONG_SENDER, "an answer to another request")
    key, _ = _keys(directory)
    certificate = certificates.verify(answer.certificate, sealed.key)
    named = (certificate.fleet, certificate.id, certificate.site, certificate.owner)
    if (
        certificate.role is not Role.DEVICE
        or certificate.public_key != key.public
        or named != (answer.fleet, answer.id, answer.site, asked.body.owner)
    ):
        raise RemoteProtocolError(RejectReason.BAD_CERTIFICATE, "the certificate is not what was asked for")
    _check_log(answer, sealed.key)
    spent, root, bundle = answer.spent, answer.root, answer.bundle
    if (directory / FLEET_FILE).exists():
        before = Identity.load(directory)
        if (before.authority_key, before.certificate.id) != (answer.authority, certificate.id):
            raise RemoteProtocolError(RejectReason.BAD_CERTIFICATE, "the answer is of another authority or device")
        # What is spent stays spent, and what was pinned stays pinned.
        spent = max(spent, before.spent)
        root, bundle = before.root, before.bundle
    else:
        write_atomic(directory / TLS_DIRECTORY / "ca.pem", answer.tls_authorities)
    write_atomic(directory / TLS_DIRECTORY / "cert.pem", answer.tls_certificate)
    _check_tls(directory)
    identity = Identity(
        key=key,
        certificate=certificate,
        encoded_certificate=answer.certificate,
        authority_key=answer.authority,
        issuer_key=sealed.key,
        spent=spent,
        root=root,
        bundle=bundle,
    )
    identity.save(directory)
    (directory / PENDING).unlink()
    return identity


def _check_log(answer: EnrolAnswer, issuer: bytes) -> None:
    """The certificate must stand in the log that everybody can audit, or it counts for nothing here."""
    head = HEAD.open(answer.head, key=issuer).body
    entry = codec.decode(LogEntry, answer.entry, limit=MAX_ENTRY)
    if (
        entry.kind is EntryKind.REVOKED
        or entry.certificate != answer.certificate
        or head.fleet != answer.fleet
        or not included(answer.entry, answer.index, head.size, answer.proof, head.root)
    ):
        raise RemoteProtocolError(RejectReason.BAD_CERTIFICATE, "the certificate is not in the log")


def _check_tls(directory: Path) -> None:
    tls = directory / TLS_DIRECTORY
    try:
        context = ssl.create_default_context(cafile=tls / "ca.pem")
        context.load_cert_chain(tls / "cert.pem", tls / "key.pem", password=lambda: b"")
    except (OSError, ssl.SSLError) as error:
        raise RemoteProtocolError(
            RejectReason.BAD_CERTIFICATE, f"the TLS certificate does not work: {error}"
        ) from error


def renew(directory: Path, *, now: int, ask: Callable[[str, bytes], bytes] | None = None) -> Identity:
    """Renew the identity in a folder at the service that it was enrolled at.

    Args:
        directory: the identity folder.
        now: unix milliseconds.
        ask: from URL and request to answer; by default HTTPS.

    Raises:
        ConfigError: the folder holds no enrolled identity, or does not say where to renew it.
        RemoteProtocolError: the service refuses, and why.
        NotReachedError: it was not reached.
    """
    url = Notes.load(directory).url
    if not url:
        raise ConfigError(f"{directory / NOTES} names no service; renew with --request FILE and --response FILE")
    request = renewal_request(directory, now=now)
    if ask is None:
        answer = send(url, Purpose.RENEW, request, ca=directory / TLS_DIRECTORY / "ca.pem")
    else:
        answer = ask(url, request)
    return take(directory, answer)


def read_answer(path: Path) -> bytes:
    """The answer in a file, bounded.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(max(MAX_ANSWER, MAX_REQUEST) + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
