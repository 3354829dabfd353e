"""The service over real HTTPS on this machine: devices, strangers, and requests that nobody should send."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import shutil
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fleetfed_testing.enrolment import NOW, Bench, sealed

from fleetfed.cloud_coordinator.enroll.config import Limits
from fleetfed.cloud_coordinator.enroll.ratelimit import RateLimit
from fleetfed.cloud_coordinator.enroll.service import EnrolService
from fleetfed.device import enroll
from fleetfed.device.cli import main
from fleetfed.device.enroll import NotReachedError, send
from fleetfed.shared.errors import RejectReason, RemoteProtocolError, StorageError
from fleetfed.shared.trust.enrolment import HEAD, parse_token
from fleetfed.shared.trust.identity import Identity
from fleetfed.shared.trust.keys import SigningKey
from fleetfed.shared.trust.merkle import Tree
from fleetfed.shared.wire.enrolment import MAX_REQUEST, Purpose


@contextlib.asynccontextmanager
async def serving(bench: Bench, **limits: object) -> AsyncIterator[tuple[EnrolService, str]]:
    settings = dataclasses.replace(bench.settings, limits=Limits(**{"per_minute": 1000, **limits}))  # type: ignore[arg-type]
    service = EnrolService(bench.enroller, settings)
    await service.start()
    stop = asyncio.Event()
    running = asyncio.create_task(service.run(stop))
    try:
        yield service, f"https://localhost:{service.http.port}"
    finally:
        stop.set()
        await running


async def raw(bench: Bench, port: int, data: bytes) -> bytes:
    context = ssl.create_default_context(cafile=bench.ca)
    reader, writer = await asyncio.open_connection("localhost", port, ssl=context)
    try:
        writer.write(data)
        await writer.drain()
        return await reader.read(100_000)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def get(bench: Bench, port: int, path: str) -> tuple[int, bytes]:
    answer = await raw(bench, port, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


async def test_a_device_enrols_and_renews_with_its_command_line(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bench.path / "device"
    ca = bench.path / "ca.pem"
    shutil.copy(bench.ca, ca)
    async with serving(bench) as (_, url):
        command = ["enroll", "--url", url, "--ca", ca, "--identity", folder, "--hardware", "SN-1"]
        arguments = [*map(str, command), "--token", bench.token()]
        assert await asyncio.to_thread(main, arguments) == 0
        identity = Identity.load(folder)
        assert capsys.readouterr().out.startswith(f"{identity.certificate.id} of ward-3 at north, until ")
        assert await asyncio.to_thread(main, arguments) == 2
        assert "holds an identity already" in capsys.readouterr().err
        assert await asyncio.to_thread(main, ["renew", "--identity", str(folder)]) == 0
        assert "due in" in capsys.readouterr().out
        later = NOW + 19 * 86_400_000
        monkeypatch.setattr("fleetfed.device.cli_enroll.unix_ms", lambda: later)
        monkeypatch.setattr(bench.enroller, "answer", _at(bench, later))
        assert await asyncio.to_thread(main, ["renew", "--identity", str(folder)]) == 0
        assert Identity.load(folder).certificate.serial == identity.certificate.serial + 1


def _at(bench: Bench, now: int):  # type: ignore[no-untyped-def]
    answer = bench.enroller.answer
    return lambda data, *, purpose=None, **_: answer(data, now=now, purpose=purpose)


async def test_a_refusal_comes_back_with_its_reason_and_the_request_is_kept(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    token = bench.token()
    bench.enrol("d1", token=token)
    folder = bench.path / "device"
    async with serving(bench) as (_, url):
        command = [
            "enroll",
            "--url",
            url,
            "--ca",
            bench.ca,
            "--identity",
            folder,
            "--hardware",
            "SN-2",
            "--token",
            token,
        ]
        assert await asyncio.to_thread(main, [*map(str, command)]) == 2
    assert "spent_token" in capsys.readouterr().err
    assert (folder / enroll.PENDING).exists()
    assert not (folder / "fleet.toml").exists()


async def test_an_answer_lost_on_the_way_is_fetched_again(bench: Bench) -> None:
    async with serving(bench) as (_, url):
        request = bench.request("d1", bench.token(), url=url)
        first = await asyncio.to_thread(send, url, Purpose.ENROL, request, ca=bench.ca)
        again = await asyncio.to_thread(send, url, Purpose.ENROL, request, ca=bench.ca)
    assert first == again
    assert len(bench.enroller.log()) == 1


async def test_a_service_of_another_authority_is_told_nothing(bench: Bench, tmp_path: Path) -> None:
    other = Bench(tmp_path / "other")
    try:
        async with serving(bench) as (_, url):
            with pytest.raises(NotReachedError, match="not of"):
                await asyncio.to_thread(send, url, Purpose.ENROL, b"secret", ca=other.ca)
            named = url.replace("localhost", "127.0.0.2")
            with pytest.raises(NotReachedError):
                await asyncio.to_thread(send, named, Purpose.ENROL, b"secret", ca=bench.ca)
    finally:
        other.enroller.close()


async def test_an_enrolment_does_not_pass_as_a_renewal(bench: Bench) -> None:
    async with serving(bench) as (_, url):
        request = bench.request("d1", bench.token())
        with pytest.raises(RemoteProtocolError) as caught:
            await asyncio.to_thread(send, url, Purpose.RENEW, request, ca=bench.ca)
    assert caught.value.reason is RejectReason.MALFORMED
    assert not bench.enroller.log()


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"POST /v1/enrol HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % (MAX_REQUEST + 1), 413),
        (b"POST /v1/enrol HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n", 411),
        (b"POST /v1/enrol HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
        (b"POST /v1/enrol HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 411),
        (b"POST /v1/enrol HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx", 400),
        (b"POST /v1/enrol HTTP/1.1\r\n\r\n", 411),
        (b"POST /v1/enrol HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", 400),
        (b"DELETE /v1/enrol HTTP/1.1\r\n\r\n", 400),
        (b"GET /v1/nothing HTTP/1.1\r\n\r\n", 404),
        (b"GET /v1/log/-1 HTTP/1.1\r\n\r\n", 404),
        (b"GET /" + b"x" * 300 + b" HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nx: " + b"y" * 10_000 + b"\r\n\r\n", 431),
        (b"\x16\x03\r\n\r\n", 400),
    ],
)
async def test_what_nobody_should_send(bench: Bench, data: bytes, status: int) -> None:
    before = bench.facts()
    async with serving(bench) as (service, _):
        answer = await raw(bench, service.http.port, data)
        assert int(answer.split()[1]) == status
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert bench.facts() == before


async def test_a_request_that_never_ends_is_cut_off(bench: Bench) -> None:
    async with serving(bench, seconds=0.1) as (service, _):
        answer = await raw(bench, service.http.port, b"POST /v1/enrol HTTP/1.1\r\nContent-Length: 10\r\n\r\nabc")
        assert answer == b""


async def test_only_so_many_are_served_at_once(bench: Bench) -> None:
    context = ssl.create_default_context(cafile=bench.ca)
    async with serving(bench, connections=1) as (service, _):
        _, held = await asyncio.open_connection("localhost", service.http.port, ssl=context)
        held.write(b"GET ")
        await held.drain()
        while not service.http.busy:  # noqa: ASYNC110 - the server tells nobody
            await asyncio.sleep(0)
        with contextlib.suppress(OSError):
            assert await raw(bench, service.http.port, b"GET /v1/health HTTP/1.1\r\n\r\n") == b""
        assert service.http.refused == 1
        held.close()


async def test_one_address_asks_only_so_often(bench: Bench) -> None:
    async with serving(bench, per_minute=2) as (service, url):
        port = service.http.port
        assert [(await get(bench, port, "/v1/head"))[0] for _ in range(3)] == [200, 200, 429]
        with pytest.raises(NotReachedError, match="wait"):
            await asyncio.to_thread(send, url, Purpose.ENROL, b"x", ca=bench.ca)
        assert (await get(bench, port, "/v1/health"))[0] == 200
    assert bench.enroller.refused[RejectReason.OVERLOADED] == 2


async def test_a_full_disk_is_said_and_nothing_is_lost(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> bytes:
        raise StorageError("disk full")

    async with serving(bench) as (_, url):
        with monkeypatch.context() as patch:
            patch.setattr(bench.enroller, "answer", full)
            with pytest.raises(NotReachedError, match="503"):
                await asyncio.to_thread(send, url, Purpose.ENROL, b"x", ca=bench.ca)
        request = sealed(SigningKey.generate(), parse_token(bench.token())[1])
        assert await asyncio.to_thread(send, url, Purpose.ENROL, request, ca=bench.ca)


async def test_anybody_reads_the_log_and_its_head(bench: Bench) -> None:
    for name in ("d1", "d2", "d3"):
        identity = bench.enrol(name)
    bench.enroller.revoke([identity.certificate.id], now=NOW)
    async with serving(bench) as (service, _):
        _, page = await get(bench, service.http.port, "/v1/log/0")
        _, head = await get(bench, service.http.port, "/v1/head")
        _, rest = await get(bench, service.http.port, "/v1/log/3")
        status, signed = await get(bench, service.http.port, "/v1/revocations")
    leaves = [bytes.fromhex(each) for each in json.loads(page)["entries"]]
    opened = HEAD.open(bytes.fromhex(json.loads(head)["head"]), key=bench.enroller.identity.key.public).body
    assert (opened.size, opened.root) == (4, Tree(leaves).root())
    assert len(json.loads(rest)["entries"]) == 1
    assert (status, signed) == (200, bench.enroller.revocations())


def test_an_address_is_refilled_over_a_minute_and_many_addresses_take_no_memory() -> None:
    limit = RateLimit(2)
    assert [limit.allows("192.0.2.1", 0.0) for _ in range(3)] == [True, True, False]
    assert limit.allows("192.0.2.2", 0.0)
    assert limit.allows("192.0.2.1", 30.0)
    assert not limit.allows("192.0.2.1", 30.0)
    assert [limit.allows(f"2001:db8::{n}", 100.0) for n in range(3)] == [True, True, False]
    assert limit.allows("2001:db8:0:1::1", 100.0)
    assert [limit.allows(each, 100.0) for each in ("::ffff:192.0.2.9", "192.0.2.9", "192.0.2.9")] == [True, True, False]
    for n in range(20_000):
        limit.allows(f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}", 200.0)
    assert limit.remembered <= 10_000
