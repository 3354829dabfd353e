"""`fleetfed-enroll` as a person calls it, and the log in the hands of somebody who trusts nobody."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from fleetfed_testing.enrolment import NOW, Bench

from fleetfed.cloud_coordinator.enroll import audit
from fleetfed.cloud_coordinator.enroll.cli import cli, run_command
from fleetfed.cloud_coordinator.enroll.enroller import DAY
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.trust.certificates import Certificate, Role, issue
from fleetfed.shared.trust.enrolment import HEAD
from fleetfed.shared.trust.keys import SigningKey
from fleetfed.shared.trust.merkle import Tree
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.enrolment import EntryKind, LogEntry, TreeHead
from tests.cloud_coordinator.cli.test_help import commands

ALL = dict(commands(cli))
LEAVES = [path for path, command in ALL.items() if not isinstance(command, click.Group)]


def call(bench: Bench, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any]:
    text = [*map(str, arguments), "--json"]
    if not {"verify", "audit"} & set(text):
        text += ["--dir", str(bench.folder)]
    code = run_command(text)
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("path", ALL, ids=lambda path: " ".join(path) or "fleetfed-enroll")
def test_help_has_an_example_and_its_options_exist(path: tuple[str, ...]) -> None:
    result = CliRunner().invoke(cli, [*path, "--help"])
    assert result.exit_code == 0
    _, found, example = result.output.partition("Example:\n")
    assert found
    assert " ".join(("fleetfed-enroll", *path)) in example
    options = {name for parameter in ALL[path].params for name in (*parameter.opts, *parameter.secondary_opts)}
    if path in LEAVES:
        assert ("--json" in options) == (path[-1] != "run")
        for line in example.splitlines():
            assert {word for word in line.split() if word.startswith("--")} <= options


def test_tokens_are_made_listed_and_taken_back(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    code, answer = call(
        bench, capsys, "token", "create", "--owner", "ward-3", "--site", "north", "--count", 3, "--expires", "12h"
    )
    assert code == 0
    texts = [row["token"] for row in answer["tokens"]]
    assert len(set(texts)) == 3
    bench.enrol("d1", token=texts[0])
    assert call(bench, capsys, "token", "revoke", answer["tokens"][1]["label"])[0] == 0
    _, listed = call(bench, capsys, "token", "list")
    assert sorted(row["state"] for row in listed["tokens"]) == ["open", "taken back", "used"]
    assert not any(text in json.dumps(listed) for text in texts)
    _, still = call(bench, capsys, "token", "list", "--open")
    assert len(still["tokens"]) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("token", "create", "--owner", "w", "--site", "_"),
        ("token", "create", "--owner", "w", "--site", "north", "--expires", "1y"),
        ("token", "create", "--owner", "w", "--site", "north", "--id", "g-north"),
        ("token", "create", "--owner", "w", "--site", "north", "--id", "d-1", "--count", 2),
        ("token", "revoke", "nobody"),
        ("revoke", "d-nobody"),
        ("revoke",),
        ("files",),
    ],
)
def test_mistakes_have_their_exit_code_and_say_so(
    bench: Bench, capsys: pytest.CaptureFixture[str], arguments: tuple[object, ...]
) -> None:
    before = bench.facts()
    code, answer = call(bench, capsys, *arguments)
    assert code == 2
    assert answer["detail"]
    assert bench.facts() == before


def test_one_command_revokes_and_writes_every_list(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.keyring.revoke(["g-north"], now=NOW)
    assert call(bench, capsys, "import", "--keys", bench.keyring.directory)[0] == 0
    settings = bench.folder / "enroll.toml"
    settings.write_text(settings.read_text() + '\n[broker]\nout = "broker"\n')
    first, second = bench.enrol("d1").certificate, bench.enrol("d2").certificate
    code, answer = call(bench, capsys, "revoke", first.id)
    assert (code, answer["revoked"], answer["delivered"]) == (0, [first.id], False)
    current = bench.folder / "broker" / "current"
    acl = (current / "acl").read_text()
    assert f"user {first.id}\ntopic deny ff1/demo/#" in acl
    assert second.id not in acl
    signed = (current / "revocations.bin").read_bytes()
    assert signed == bench.enroller.revocations() == (bench.folder / "state" / "revocations.bin").read_bytes()
    verifier = bench.verifier()
    verifier.restore(signed, now=NOW)
    (gateway,) = (member for member in bench.keyring.members if member.id == "g-north")
    assert verifier.revocations.serials == (gateway.serial, first.serial)
    code, answer = call(bench, capsys, "list", "--owner", "ward-3")
    assert {row["id"]: bool(row["revoked"]) for row in answer["devices"]} == {first.id: True, second.id: False}


def test_a_refused_file_leaves_no_answer(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    request = bench.path / "r"
    request.write_bytes(bytes(10_000))
    code, _ = call(bench, capsys, "sign", request, "--out", bench.path / "a")
    assert code == 1
    assert not (bench.path / "a").exists()


def test_init_never_overwrites(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    code, answer = call(bench, capsys, "init", "--identity", bench.keyring.identity_folder("enroller"))
    assert code == 2
    assert "never overwritten" in answer["detail"]
    assert (bench.folder / "identity" / "signing.key").stat().st_mode & 0o077 == 0
    assert (bench.folder / "state" / "ca.key").stat().st_mode & 0o077 == 0


# --- The log ---------------------------------------------------------------------------------------------------------


def exported(bench: Bench, capsys: pytest.CaptureFixture[str], name: str) -> Path:
    path = bench.path / name
    assert call(bench, capsys, "log", "export", "--out", path)[0] == 0
    return path


def test_the_log_is_verified_and_counted_without_the_service(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.enrol("d1", url="https://localhost")
    bench.enrol("d2", owner="ward-4")
    early = exported(bench, capsys, "early.jsonl")
    bench.renew("d1", now=NOW + 16 * DAY)
    (other,) = (device.id for device, _ in bench.enroller.devices() if device.owner == "ward-4")
    bench.enroller.revoke([other], now=NOW)
    path = exported(bench, capsys, "log.jsonl")
    key = bench.enroller.identity.key.public.hex()
    code, answer = call(bench, capsys, "log", "verify", path, "--key", key, "--since", early)
    assert (code, answer["size"]) == (0, 4)
    assert answer["root"] == bench.enroller.directory().root.hex()
    code, found = call(bench, capsys, "log", "audit", path)
    assert (code, found["suspicious"]) == (0, False)
    assert found["owners"]["ward-3"] == {"enrolled": 1, "renewed": 1, "revoked": 0, "valid": 1}
    assert found["owners"]["ward-4"] == {"enrolled": 1, "renewed": 0, "revoked": 1, "valid": 0}
    assert sum(sum(day.values()) for day in found["growth"].values()) == 2


@pytest.mark.parametrize("bend", ["drop", "swap", "change", "head", "cut", "more"])
def test_a_log_that_was_tampered_with_is_noticed(bench: Bench, capsys: pytest.CaptureFixture[str], bend: str) -> None:
    for name in ("d1", "d2", "d3"):
        bench.enrol(name)
    path = exported(bench, capsys, "log.jsonl")
    lines = path.read_text().splitlines()
    match bend:
        case "drop":
            del lines[2]
        case "swap":
            lines[1], lines[2] = lines[2], lines[1]
        case "change":
            lines[1] = lines[1].replace("a", "b")
        case "head":
            lines[-1] = lines[-1][:-12] + "000000000" + lines[-1][-3:]
        case "cut":
            del lines[-1]
        case "more":
            lines.append(lines[1])
    path.write_text("\n".join(lines) + "\n")
    code, _ = call(bench, capsys, "log", "verify", path)
    assert code == 2


def test_another_services_key_or_a_rewritten_past_is_noticed(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.enrol("d1")
    path = exported(bench, capsys, "log.jsonl")
    assert call(bench, capsys, "log", "verify", path, "--key", "00" * 32)[0] == 2
    key = bench.enroller.identity.key
    rewritten = Tree([b"another past"])
    other = HEAD.close(TreeHead(fleet="demo", size=1, root=rewritten.root(), at=NOW), key)
    with pytest.raises(ConfigError, match="rewritten its past"):
        audit.verify(audit.read(path), earlier=[other])


def test_an_audit_finds_what_an_honest_service_does_not_write() -> None:
    key, device = SigningKey.generate(), SigningKey.generate()

    def entry(name: str, serial: int, signing: SigningKey, hardware: bytes, kind: EntryKind) -> bytes:
        certificate = Certificate(
            serial=serial,
            role=Role.DEVICE,
            fleet="demo",
            id=name,
            site="north",
            owner="ward-3",
            not_before=NOW,
            not_after=NOW + DAY,
            public_key=signing.public,
        )
        return codec.encode(
            LogEntry(kind=kind, at=NOW, certificate=issue(certificate, key), tls_sha256=bytes(32), hardware=hardware)
        )

    base = 2 << 32
    leaves = (
        entry("d-1", base + 1, device, b"h" * 16, EntryKind.ENROLLED),
        entry("d-2", base + 2, device, b"h" * 16, EntryKind.ENROLLED),
        entry("d-2", base + 2, SigningKey.generate(), b"i" * 16, EntryKind.RENEWED),
        entry("d-3", base + 4, SigningKey.generate(), b"i" * 16, EntryKind.ENROLLED),
        entry("d-4", 9 << 32, SigningKey.generate(), b"j" * 16, EntryKind.ENROLLED),
    )
    head = HEAD.close(TreeHead(fleet="demo", size=5, root=Tree(leaves).root(), at=NOW), key)
    found = audit.audit(audit.verify(audit.Export("demo", key.public, leaves, head)), now=NOW)
    assert found.suspicious
    assert found.keys_of_many == {device.public.hex(): ["d-1", "d-2"]}
    assert list(found.ids_of_many) == ["d-2"]
    assert list(found.hardware_of_many.values()) == [["d-2", "d-3"]]
    assert found.moved == ["d-2"]
    assert found.serials_twice == [base + 2, 9 << 32]
