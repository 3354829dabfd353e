"""An MQTT session of ours with a record of what happened to it."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from typing import Any

from fleetfed.shared.mqtt.config import ConnectionConfig, Will
from fleetfed.shared.mqtt.session import Session
from fleetfed_testing.waiting import PATIENCE


class Peer:
    """A session with a record of what happened to it."""

    def __init__(self, config: ConnectionConfig, *subscriptions: str, will: Will | None = None) -> None:
        self.connects: list[bool] = []
        self.losses: list[str] = []
        self.messages: list[tuple[str, bytes, bool]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.changed = asyncio.Condition()
        self.on_each: Callable[[bytes], Any] | None = None
        self.session = Session(
            config,
            subscriptions=subscriptions,
            on_connect=self._connect,
            on_message=self._message,
            on_disconnect=self._loss,
            will=will,
            rng=random.Random(1),
        )
        self.task = asyncio.create_task(self.session.run())

    @property
    def payloads(self) -> list[bytes]:
        return [payload for _, payload, _ in self.messages]

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(PATIENCE), self.changed:
            await self.changed.wait_for(condition)

    async def stop(self) -> None:
        self.gate.set()
        if self.task.done():
            return
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task

    async def _note(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def _connect(self, session_present: bool) -> None:
        self.connects.append(session_present)
        await self._note()

    async def _loss(self, reason: str) -> None:
        self.losses.append(reason)
        await self._note()

    async def _message(self, topic: str, payload: bytes, retained: bool) -> None:
        await self.gate.wait()
        if self.on_each is not None:
            await self.on_each(payload)
        self.messages.append((topic, payload, retained))
        await self._note()


MakePeer = Callable[..., Any]
