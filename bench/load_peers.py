"""What stands in the gateway's place for `bench/load.py`, on the broker that is measured alone.

- `listen` only receives: what the broker can do.
- `answer` does besides what no gateway can leave out, and nothing else: it reads an update's head, compares the body's
  hash, verifies the signature, writes the body to the disk, and sends a signed answer of a receipt's size once an fsync
  has covered it. It does not decompress, check, add or remember anything, and has no rounds, database or metrics.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

from load_client import KEEPALIVE, Line, cpu_seconds

from fleetfed.shared.clock import unix_ms
from fleetfed.shared.trust.identity import Identity
from fleetfed.shared.trust.keys import SigningKey, signature_is_good
from fleetfed.shared.wire.chunks import FRAME_SIZE
from fleetfed.shared.wire.envelope import digest, parse_head, signed_bytes
from fleetfed.shared.wire.topics import Kind, MemberTopic, SiteTopics, Verb, parse

WINDOW = 64
"""Messages ahead of the confirmation, as the gateway's session."""
Batch = asyncio.Queue[tuple[str, bytes]]

_RECEIPT = 700
"""Bytes of a receipt, certificate and all."""


class Peer:
    """One that listens, or answers.

    Args:
        port: of the broker.
        identity: folder of the gateway in whose place it stands.
        site: that the gateway serves.
        disk: a folder for what is written.
    """

    def __init__(self, port: int, identity: Path, site: SiteTopics, disk: Path) -> None:
        self._port = port
        self._folder = identity
        self._site = site
        self._identity = Identity.load(identity)
        self._verifier = self._identity.verifier()
        self._key = SigningKey.generate()
        self._file = tempfile.TemporaryFile(dir=disk, buffering=0)  # noqa: SIM115  # it lives as long as the process
        self._arrived: Batch = asyncio.Queue()
        self._opened: Batch = asyncio.Queue()
        self._done = asyncio.Event()
        self._handle: Callable[[str, memoryview], None] = self._count
        self._seen = self._wanted = self._size = 0
        self._ended = 0.0

    async def run(self, pipe: Connection) -> None:
        """Do as told over the pipe: how to treat the next messages, and how many."""
        loop = asyncio.get_running_loop()
        updates = self._site.all_up(Kind.DEVICE, Verb.UPDATE)
        name = self._identity.certificate.id
        line = Line(name, [updates], self._received, receive_maximum=WINDOW, window=WINDOW)
        await line.connect(self._port, self._folder)
        tasks = [loop.create_task(each) for each in (self._open(), self._answer(line))]
        for task in tasks:
            task.add_done_callback(_fail_with)
        pipe.send("ready")
        while (command := await loop.run_in_executor(None, pipe.recv)) is not None:
            how, self._wanted = command
            self._handle = self._count if how == "listen" else self._take
            self._seen = self._size = 0
            self._file.truncate(0)
            self._done.clear()
            cpu = cpu_seconds(os.getpid())
            pipe.send("listening")
            while not self._done.is_set():
                try:
                    await asyncio.wait_for(self._done.wait(), KEEPALIVE / 2)
                except TimeoutError:
                    line.ping()
            pipe.send((self._ended, self._size, cpu_seconds(os.getpid()) - cpu))
        for task in tasks:
            task.cancel()
        line.close()

    def _received(self, topic: str, payload: memoryview) -> None:
        self._handle(topic, payload)

    def _count(self, topic: str, payload: memoryview) -> None:
        self._seen += 1
        self._size += len(payload)
        if self._seen == self._wanted:
            self._ended = time.monotonic()
            self._done.set()

    def _take(self, topic: str, payload: memoryview) -> None:
        self._arrived.put_nowait((topic, bytes(payload)))

    async def _open(self) -> None:
        """While one batch is hashed in a thread, the next one gathers."""
        loop, thread = asyncio.get_running_loop(), ThreadPoolExecutor(1)
        while True:
            for each in await loop.run_in_executor(thread, self._check, await _all(self._arrived)):
                self._opened.put_nowait(each)

    async def _answer(self, line: Line) -> None:
        """While one batch is written, the next one gathers."""
        loop, thread = asyncio.get_running_loop(), ThreadPoolExecutor(1)
        while True:
            batch = await _all(self._opened)
            await loop.run_in_executor(thread, self._write, [body for _, body in batch])
            for topic, body in batch:
                line.publish(topic, self._key.sign(digest(body[:32])).ljust(_RECEIPT, b"\0"))
                self._count(topic, memoryview(body))

    def _check(self, batch: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
        found, now = [], unix_ms()
        for topic, payload in batch:
            where = parse(topic)
            assert isinstance(where, MemberTopic)
            message = memoryview(payload)[FRAME_SIZE:]
            head = parse_head(message)
            public = self._verifier.certificate(head.certificate, now=now).public_key
            assert signature_is_good(public, signed_bytes(head.header.kind, head.signed), head.signature)
            assert digest(message[head.size :]) == head.header.body_hash, "in one chunk, please: at most 120 KB"
            found.append((self._site.down(Kind.DEVICE, where.member, Verb.RECEIPT), payload))
        return found

    def _write(self, bodies: list[bytes]) -> None:
        for body in bodies:
            self._file.write(body)
        os.fdatasync(self._file.fileno())


def _fail_with(task: asyncio.Task[None]) -> None:
    """Whoever measures must not wait for what cannot come."""
    if not task.cancelled() and (error := task.exception()) is not None:
        raise SystemExit(f"the bare gateway: {error!r}")


async def _all(queue: Batch) -> list[tuple[str, bytes]]:
    """What waits, at least one."""
    batch = [await queue.get()]
    while not queue.empty():
        batch.append(queue.get_nowait())
    return batch


def stand_in(port: int, identity: Path, site: SiteTopics, disk: Path, pipe: Connection) -> None:
    """The process of a `Peer`."""

    async def main() -> None:
        await Peer(port, identity, site, disk).run(pipe)

    asyncio.run(main())
