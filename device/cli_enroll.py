"""``fleetfed-device enroll`` and ``renew``: how a device gets, and keeps, its identity."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fleetfed.shared.clock import unix_ms
from fleetfed.shared.errors import ConfigError, RejectReason, RemoteProtocolError

if TYPE_CHECKING:
    from fleetfed.shared.trust.identity import Identity
    from fleetfed.shared.wire.enrolment import Purpose

_ENROLL: Final = """examples:
  fleetfed-device enroll --url https://enroll.example.org:8443 --ca ca.pem --identity identity --token ward-3.xxxxx-…
  fleetfed-device enroll --identity identity --token - --request d.request      # then, where the service is:
  fleetfed-enroll sign d.request --out d.answer                                 # and back here:
  fleetfed-device enroll --identity identity --response d.answer

The keys are made here and never leave. The same command may be repeated until it succeeds."""

_RENEW: Final = """examples:
  fleetfed-device renew --identity identity                   # from a timer; does nothing before half of the life
  fleetfed-device renew --identity identity --request d.request
  fleetfed-device renew --identity identity --response d.answer

A device that runs renews by itself."""


def add_commands(commands: Any, formatter: Any) -> None:
    """Add both commands to a parser's."""
    enroll = commands.add_parser(
        "enroll",
        help="make keys and have them certified, for a one-time token",
        epilog=_ENROLL,
        formatter_class=formatter,
    )
    enroll.add_argument("--token", help="as it was given to the owner; - reads it from standard input")
    enroll.add_argument("--url", help="https://HOST:PORT of the enrolment service")
    enroll.add_argument("--ca", type=Path, metavar="FILE", help="the fleet's CA file, which the service is checked by")
    enroll.add_argument("--hardware", default="", help="name of this hardware, e.g. its serial number")
    renew = commands.add_parser(
        "renew", help="have the certificate prolonged", epilog=_RENEW, formatter_class=formatter
    )
    renew.add_argument("--force", action="store_true", help="also before half of its life")
    for command, function in ((enroll, _enroll), (renew, _renew)):
        command.add_argument("--identity", type=Path, required=True, metavar="DIR", help="the identity folder")
        command.add_argument("--request", type=Path, metavar="FILE", help="write the request there, send nothing")
        command.add_argument("--response", type=Path, metavar="FILE", help="take the answer from there")
        command.set_defaults(command=function)


def _enroll(options: argparse.Namespace) -> int:
    from fleetfed.device import enroll
    from fleetfed.device.notes import Notes
    from fleetfed.shared.wire.enrolment import Purpose

    if options.response is not None:
        return _take(options)
    if not options.token:
        raise ConfigError("give --token; whoever runs the enrolment service makes one for this device's owner")
    if (options.request is None) == (options.url is None):
        raise ConfigError("give either --url, to ask the service, or --request FILE, to carry the request there")
    if options.url is not None and options.ca is None:
        raise ConfigError("give --ca FILE: without it nobody knows whether the service is the fleet's")
    token = sys.stdin.readline() if options.token == "-" else options.token  # noqa: S105 - not a password
    notes = Notes(url=options.url or "", hardware=options.hardware)
    request = enroll.first_request(options.identity, token, notes=notes, now=unix_ms())
    if options.request is not None:
        return _write(options, request)
    return _ask(options, options.url, Purpose.ENROL, request, options.ca)


def _renew(options: argparse.Namespace) -> int:
    from fleetfed.device import enroll, renewal
    from fleetfed.device.notes import NOTES, Notes
    from fleetfed.shared.trust.certificates import Role
    from fleetfed.shared.trust.identity import TLS_DIRECTORY, Identity
    from fleetfed.shared.wire.enrolment import Purpose

    if options.response is not None:
        return _take(options)
    identity = Identity.load(options.identity, role=Role.DEVICE)
    now = unix_ms()
    if not options.force and options.request is None and now < renewal.due(identity.certificate):
        hours = (renewal.due(identity.certificate) - now) // 3_600_000
        print(f"{identity.certificate.id}: due in {hours // 24} days {hours % 24} hours")
        return 0
    request = enroll.renewal_request(options.identity, now=now)
    if options.request is not None:
        return _write(options, request)
    url = Notes.load(options.identity).url
    if not url:
        raise ConfigError(f"{options.identity / NOTES} names no service: use --request and --response")
    return _ask(options, url, Purpose.RENEW, request, options.identity / TLS_DIRECTORY / "ca.pem")


def _ask(options: argparse.Namespace, url: str, purpose: Purpose, request: bytes, ca: Path) -> int:
    from fleetfed.device import enroll

    try:
        answer = enroll.send(url, purpose, request, ca=ca)
    except RemoteProtocolError as error:
        raise ConfigError(f"refused: {error}{_ADVICE.get(error.reason, '')}") from error
    return _done(enroll.take(options.identity, answer))


def _write(options: argparse.Namespace, request: bytes) -> int:
    options.request.write_bytes(request)
    options.request.chmod(0o600)
    print(f"{options.request}: carry it to the enrolment service; `fleetfed-enroll sign` answers it")
    return 0


def _take(options: argparse.Namespace) -> int:
    from fleetfed.device import enroll

    try:
        return _done(enroll.take(options.identity, enroll.read_answer(options.response)))
    except RemoteProtocolError as error:
        raise ConfigError(f"{options.response}: {error}") from error


def _done(identity: Identity) -> int:
    from datetime import UTC, datetime

    certificate = identity.certificate
    until = datetime.fromtimestamp(certificate.not_after / 1000, UTC)
    print(f"{certificate.id} of {certificate.owner} at {certificate.site}, until {until:%Y-%m-%d %H:%M} UTC")
    return 0


_ADVICE: Final = {
    RejectReason.SPENT_TOKEN: "; ask for another token",
    RejectReason.BAD_TOKEN: "; ask for another token",
    RejectReason.EXPIRED: "; ask for another token",
    RejectReason.REVOKED: "; this device was shut out on purpose",
}
