"""An enrolment service of a small fleet, and devices that ask it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from fleetfed.cloud_coordinator.enroll.cli import run_command
from fleetfed.cloud_coordinator.enroll.config import EnrollConfig, load
from fleetfed.cloud_coordinator.enroll.enroller import DAY, Enroller
from fleetfed.cloud_coordinator.keys.keyring import Keyring, MemberRole, NewMember
from fleetfed.device import csr, enroll
from fleetfed.device.notes import Notes
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.trust.enrolment import REQUEST
from fleetfed.shared.trust.identity import Identity
from fleetfed.shared.trust.keys import SigningKey
from fleetfed.shared.trust.verifier import Verifier
from fleetfed.shared.wire.enrolment import EnrolRequest, Purpose

NOW = unix_ms()


class Bench:
    """One fleet's key folder, its service, and whatever devices want."""

    def __init__(self, directory: Path) -> None:
        self.path = directory
        self.keyring = Keyring.create(directory / "keys", "demo", now=NOW)
        self.keyring.issue(
            [
                NewMember(id="coordinator", role=MemberRole.COORDINATOR),
                NewMember(id="enroller", role=MemberRole.ENROLLER, hosts=("localhost", "127.0.0.1")),
            ],
            now=NOW,
        )
        self.keyring.issue([NewMember(id="g-north", role=MemberRole.GATEWAY, site="north")], now=NOW)
        self.folder = directory / "enroll"
        identity = self.keyring.identity_folder("enroller")
        arguments = ["init", "--identity", identity, "--keys", directory / "keys", "--dir", self.folder]
        assert run_command([*map(str, arguments), "--json"]) == 0
        self.settings: EnrollConfig = dataclasses.replace(load(self.folder / "enroll.toml"), host="127.0.0.1", port=0)
        self.enroller = Enroller.open(self.settings)

    @property
    def ca(self) -> Path:
        """What the service's certificate is checked against."""
        return self.folder / "identity" / "tls" / "ca.pem"

    def reopen(self) -> None:
        """A crash of the service and a new start."""
        self.enroller.close()
        self.enroller = Enroller.open(self.settings)

    def token(self, *, owner: str = "ward-3", now: int = NOW, **settings: object) -> str:
        """A new token, as a person gets it."""
        values = {"site": "north", "lifetime": DAY, **settings}
        return self.enroller.create_token(owner=owner, now=now, **values).text  # type: ignore[arg-type]

    def request(self, name: str, token: str, *, hardware: str = "", now: int = NOW, url: str = "") -> bytes:
        """The request of a device with its folder in ``name``."""
        notes = Notes(url=url, hardware=hardware or f"SN-{name}")
        return enroll.first_request(self.path / name, token, notes=notes, now=now)

    def enrol(
        self, name: str, *, now: int = NOW, token: str | None = None, url: str = "", **settings: object
    ) -> Identity:
        """A device that enrols and takes its identity."""
        text = self.token(now=now, **settings) if token is None else token
        answer = self.enroller.answer(self.request(name, text, now=now, url=url), now=now)
        return enroll.take(self.path / name, answer)

    def renew(self, name: str, *, now: int) -> Identity:
        """The device renews."""
        return enroll.renew(self.path / name, now=now, ask=lambda _, request: self.enroller.answer(request, now=now))

    def refusal(self, request: bytes, *, now: int = NOW) -> RejectReason:
        """Why a request is refused; that nothing has changed is checked."""
        before = self.facts()
        with pytest.raises(RemoteProtocolError) as caught:
            self.enroller.answer(request, now=now)
        assert self.facts() == before
        assert self.enroller.refused[caught.value.reason] >= 1
        return caught.value.reason

    def facts(self) -> object:
        """All that a refusal must leave as it was."""
        return self.enroller.tokens(), self.enroller.devices(), self.enroller.log(), self.enroller.directory()

    def verifier(self) -> Verifier:
        """Somebody who trusts the authority, and the service for devices."""
        verifier = Verifier("demo", self.keyring.authority_key)
        verifier.trust(self.keyring.authorities())
        return verifier


def sealed(key: SigningKey, token: bytes, *, purpose: Purpose = Purpose.ENROL, **changes: object) -> bytes:
    """A request made by hand."""
    values = {
        "purpose": purpose,
        "owner": "ward-3",
        "hardware": "SN-1",
        "tls_request": csr.request(os.urandom(32), "d"),
        "token": token,
        "nonce": os.urandom(16),
        "issued_at": NOW,
        **changes,
    }
    return REQUEST.close(EnrolRequest(**values), key)  # type: ignore[arg-type]
