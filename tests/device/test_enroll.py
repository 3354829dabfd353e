"""The device's side of enrolment: what a crash leaves, answers that are not for us, and renewal while rounds go on."""

from __future__ import annotations

import dataclasses
import random
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from fleetfed_testing.enrolment import NOW, Bench

from fleetfed.cloud_coordinator.enroll.enroller import DAY
from fleetfed.device import csr, enroll
from fleetfed.device.cli import main
from fleetfed.device.enroll import NotReachedError
from fleetfed.device.ledger import Account
from fleetfed.device.notes import Notes
from fleetfed.device.renewal import Renewal, RenewalThread, Renewed, due
from fleetfed.device.runtime import _begun
from fleetfed.shared.errors import ConfigError, RejectReason, RemoteProtocolError
from fleetfed.shared.trust.enrolment import ANSWER, REQUEST
from fleetfed.shared.trust.identity import Identity
from fleetfed.shared.wire.enrolment import SPENT_ALL

URL = "https://localhost:1"


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Bench]:
    made = Bench(tmp_path)
    capsys.readouterr()
    yield made
    made.enroller.close()


# --- Enrolment -------------------------------------------------------------------------------------------------------


def test_keys_are_made_once_and_only_their_owner_reads_them(bench: Bench) -> None:
    folder = bench.path / "d1"
    bench.request("d1", bench.token())
    before = (folder / "signing.key").read_bytes(), (folder / "tls" / "key.pem").read_bytes()
    request = bench.request("d1", bench.token())
    assert before == ((folder / "signing.key").read_bytes(), (folder / "tls" / "key.pem").read_bytes())
    for path in (folder / "signing.key", folder / "tls" / "key.pem", folder / enroll.PENDING):
        assert path.stat().st_mode & 0o077 == 0
    assert before[0] not in request
    assert csr.seed_of(before[1]) not in request


def test_a_crash_at_any_file_of_an_answer_is_mended_by_taking_it_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = bench.enroller.answer(bench.request("d1", bench.token()), now=NOW)
    folder = bench.path / "d1"

    class PowerCutError(Exception):
        pass

    for survives in range(20):
        left = iter(range(survives))
        write = enroll.write_atomic

        def cut(*arguments: object, **options: object) -> None:
            if next(left, None) is None:  # noqa: B023
                raise PowerCutError
            write(*arguments, **options)  # type: ignore[arg-type]  # noqa: B023

        with monkeypatch.context() as patch:
            for module in ("device.enroll", "shared.trust.identity", "shared.trust.keys"):
                patch.setattr(f"fleetfed.{module}.write_atomic", cut)
            try:
                identity = enroll.take(folder, answer)
                break
            except PowerCutError:
                assert (folder / enroll.PENDING).exists()
                with pytest.raises(ConfigError):
                    Identity.load(folder)
    assert survives > 3
    assert Identity.load(folder) == identity


def test_an_answer_to_somebody_else_is_refused(bench: Bench) -> None:
    first = bench.enroller.answer(bench.request("d1", bench.token()), now=NOW)
    bench.request("d2", bench.token())
    with pytest.raises(RemoteProtocolError) as caught:
        enroll.take(bench.path / "d2", first)
    assert caught.value.reason is RejectReason.WRONG_SENDER
    assert not (bench.path / "d2" / "fleet.toml").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"id": "d-other"},
        {"site": "south"},
        {"fleet": "other"},
        {"index": 1},
        {"proof": (bytes(32),)},
        {"entry": b"\x80"},
        {"tls_certificate": b"no certificate"},
    ],
)
def test_an_answer_that_is_not_right_changes_nothing(bench: Bench, changes: dict[str, object]) -> None:
    honest = ANSWER.open(bench.enroller.answer(bench.request("d1", bench.token()), now=NOW)).body
    bent = ANSWER.close(dataclasses.replace(honest, **changes), bench.enroller.identity.key)  # type: ignore[arg-type]
    with pytest.raises(RemoteProtocolError):
        enroll.take(bench.path / "d1", bent)
    assert not (bench.path / "d1" / "fleet.toml").exists()
    assert (bench.path / "d1" / enroll.PENDING).exists()


def test_a_certificate_that_is_not_in_the_log_counts_for_nothing(bench: Bench) -> None:
    first = ANSWER.open(bench.enroller.answer(bench.request("d1", bench.token()), now=NOW)).body
    second = ANSWER.open(bench.enroller.answer(bench.request("d2", bench.token()), now=NOW)).body
    # The proof, entry and head of somebody who is in the log.
    bent = dataclasses.replace(first, index=second.index, entry=second.entry, head=second.head, proof=second.proof)
    with pytest.raises(RemoteProtocolError, match="not in the log"):
        enroll.take(bench.path / "d1", ANSWER.close(bent, bench.enroller.identity.key))


def test_offline_by_files(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    from fleetfed.cloud_coordinator.enroll.cli import run_command

    folder, request, answer = bench.path / "d", bench.path / "d.request", bench.path / "d.answer"
    device = ["--identity", str(folder)]
    ask = ["enroll", *device, "--token", bench.token(), "--hardware", "SN-9", "--request", str(request)]
    assert main(ask) == 0
    assert run_command(["sign", str(request), "--out", str(answer), "--dir", str(bench.folder)]) == 0
    assert main(["enroll", *device, "--response", str(answer)]) == 0
    identity = Identity.load(folder)
    assert capsys.readouterr().out.splitlines()[-1].startswith(identity.certificate.id)
    assert main(["enroll", *device, "--response", str(answer)]) == 2
    assert "waits for no answer" in capsys.readouterr().err
    assert main(["renew", *device, "--request", str(request)]) == 0
    assert REQUEST.open(request.read_bytes()).body.purpose == "renew"
    # Signed offline in the past, it is too early, and gives the same certificate.
    assert run_command(["sign", str(request), "--out", str(answer), "--dir", str(bench.folder)]) == 0
    assert main(["renew", *device, "--response", str(answer)]) == 0
    assert Identity.load(folder).certificate == identity.certificate
    assert main(["renew", *device, "--force"]) == 2
    assert "--request" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--token"),
        (["--token", "x"], "--url"),
        (["--token", "x", "--url", URL], "--ca"),
        (["--token", "x", "--url", URL, "--ca", "/nowhere", "--hardware", "h"], "OWNER.xxxxx"),
    ],
)
def test_what_is_missing_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["enroll", "--identity", str(tmp_path / "d"), *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("url", ["http://localhost", "localhost", "https://", "https://u@localhost"])
def test_only_https_is_spoken(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match="https"):
        enroll.send(url, enroll.Purpose.ENROL, b"x", ca=tmp_path / "ca.pem")


def test_a_machine_without_an_id_asks_for_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enroll, "_MACHINE_ID", tmp_path / "machine-id")
    with pytest.raises(ConfigError, match="--hardware"):
        enroll.machine()
    (tmp_path / "machine-id").write_text("0123456789abcdef\n")
    assert "0123456789abcdef" not in enroll.machine()
    assert enroll.machine() == enroll.machine()
    assert enroll.machine("SN-1") == "SN-1"


def test_a_lost_key_begins_with_a_spent_ledger(bench: Bench) -> None:
    first = bench.enrol("d1")
    bench.enroller.revoke([first.certificate.id], now=NOW)
    notes = Notes(hardware="SN-d1")
    request = enroll.first_request(bench.path / "again", bench.token(), notes=notes, now=NOW)
    again = enroll.take(bench.path / "again", bench.enroller.answer(request, now=NOW))
    assert Identity.load(bench.path / "again").spent == SPENT_ALL
    assert _begun(Account(), again.spent).participations == SPENT_ALL
    assert _begun(Account(participations=3), first.spent).participations == 3


# --- Renewal ---------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> int:
        return self.now


def renewal(bench: Bench, clock: Clock, done: list[Renewed], ask: object = None) -> Renewal:
    def reach(url: str, request: bytes) -> bytes:
        assert url == URL
        return bench.enroller.answer(request, now=clock.now)

    return Renewal(bench.path / "d1", clock=clock, done=done.append, rng=random.Random(1), ask=ask or reach)  # type: ignore[arg-type]


def test_it_renews_at_half_of_the_life_and_no_sooner(bench: Bench) -> None:
    certificate = bench.enrol("d1", url=URL).certificate
    assert certificate.not_before + 15 * DAY <= due(certificate) <= certificate.not_before + 18 * DAY
    clock, done = Clock(), []
    each = renewal(bench, clock, done)
    assert 0 < each.step() <= 3600
    clock.now = due(certificate) - 5000
    assert each.step() == 5
    assert not done
    clock.now = due(certificate)
    each.step()
    (news,) = done
    assert news.identity.certificate.not_after == clock.now + 30 * DAY
    assert Identity.load(bench.path / "d1") == news.identity
    assert each.step() > 0
    assert len(done) == 1
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_cert_chain(bench.path / "d1" / "tls" / "cert.pem", bench.path / "d1" / "tls" / "key.pem")


def test_failures_are_tried_again_ever_more_rarely(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    certificate = bench.enrol("d1", url=URL).certificate
    clock, done = Clock(), []
    clock.now = due(certificate)

    def away(url: str, request: bytes) -> bytes:
        raise NotReachedError(f"{url}: away")

    each = renewal(bench, clock, done, away)
    waits = [each.step() for _ in range(14)]
    assert all(30 * 2**n <= wait <= 60 * 2**n for n, wait in enumerate(waits[:8]))
    assert max(waits) <= 6 * 3600
    assert "away" in caplog.text
    assert not done
    renewal(bench, clock, done).step()
    assert len(done) == 1


def test_a_revoked_device_says_what_to_do(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    certificate = bench.enrol("d1", url=URL).certificate
    bench.enroller.revoke([certificate.id], now=NOW)
    clock, done = Clock(), []
    clock.now = due(certificate)
    renewal(bench, clock, done).step()
    assert "revoked" in caplog.text
    assert "enrol it anew" in caplog.text
    assert not done
    assert Identity.load(bench.path / "d1").certificate == certificate


def test_an_answer_of_another_fleet_does_not_replace_an_identity(bench: Bench, tmp_path: Path) -> None:
    before = bench.enrol("d1", url=URL)
    other = Bench(tmp_path / "other")
    try:
        request = enroll.renewal_request(bench.path / "d1", now=NOW + 19 * DAY)
        honest = ANSWER.open(bench.enroller.answer(request, now=NOW + 19 * DAY)).body
        bent = dataclasses.replace(honest, authority=other.keyring.authority_key)
        with pytest.raises(RemoteProtocolError):
            enroll.take(bench.path / "d1", ANSWER.close(bent, bench.enroller.identity.key))
        assert Identity.load(bench.path / "d1") == before
    finally:
        other.enroller.close()


def test_an_identity_that_was_issued_has_no_renewal(bench: Bench) -> None:
    folder = bench.keyring.identity_folder("g-north")
    thread = RenewalThread(folder, renewal(bench, Clock(), []))
    thread.start()
    thread.stop()
    with pytest.raises(ConfigError, match="names no service"):
        enroll.renew(folder, now=NOW)
