"""An event loop whose time is the world's, and whose threads are work that the world does when it likes.

`VirtualLoop.settle` runs everything that can run now. Nothing waits for real: where the loop would sleep, it stops and
says until when (`VirtualLoop.next_timer`). ``run_in_executor`` only queues: `VirtualLoop.jobs` are performed by the
world, one at a time, so that messages, crashes and disk writes meet in any order.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import selectors
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

START = 1_800_000_000_000
"""Unix milliseconds at which every simulation begins."""

_LIVELOCK = 20_000
"""Turns of the loop without a pause that no fleet of this size needs."""

OWNER: contextvars.ContextVar[object] = contextvars.ContextVar("owner")
"""The process on whose behalf code runs; tasks and jobs inherit it."""


@dataclass
class Job:
    """Work for a thread: of one process, for one executor, in order."""

    owner: object
    lane: int
    work: Callable[[], Any]
    future: asyncio.Future[Any]

    def perform(self) -> None:
        """Do it; whoever waits learns how it ended."""
        if self.future.cancelled():
            return
        try:
            result = self.work()
        except Exception as error:  # noqa: BLE001 - whatever it is, the waiting task gets it
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


class _Idle(selectors.BaseSelector):
    """Watches nothing: where the loop would wait, it ends."""

    def __init__(self) -> None:
        self.loop: VirtualLoop
        self.busy = 0
        self._keys: dict[Any, selectors.SelectorKey] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        key = selectors.SelectorKey(fileobj, fileobj if isinstance(fileobj, int) else fileobj.fileno(), events, data)
        self._keys[fileobj] = key
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys.pop(fileobj)

    def get_map(self) -> Any:
        return self._keys

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys[fileobj]

    def select(self, timeout: float | None = None) -> list[Any]:
        self.busy += 1
        self.loop.turns += 1
        if self.busy >= _LIVELOCK:
            raise AssertionError(f"the loop never comes to rest; ready is {self.loop.ready()}")
        if timeout is None or timeout > 0:
            self.loop.next_timer = None if timeout is None else self.loop.now + max(1, ceil(timeout * 1000))
            self.loop.stop()
        return []

    def close(self) -> None:
        self._keys.clear()


class VirtualLoop(asyncio.SelectorEventLoop):
    """See the module."""

    def __init__(self) -> None:
        self.now = START
        self.next_timer: int | None = None
        self.jobs: dict[tuple[int, int], deque[Job]] = {}
        self.tasks: dict[asyncio.Task[Any], object] = {}
        self.errors: list[dict[str, Any]] = []
        self.turns = 0
        self.alarm: BaseException | None = None
        """What a signal raised while a program ran: a time limit of the tests, or the keyboard."""
        self._lanes = itertools.count()
        self._lane_of: dict[object, int] = {}
        idle = _Idle()
        idle.loop = self
        self._idle = idle
        super().__init__(idle)
        self.set_task_factory(self._make_task)
        self.set_exception_handler(lambda _loop, context: self.errors.append(context))

    def time(self) -> float:
        # Small numbers: a float of seconds since 1970 does not tell microseconds apart.
        return (self.now - START) / 1000

    def clock(self) -> int:
        """Unix milliseconds."""
        return self.now

    def ready(self) -> list[str]:
        """What would run next, for whoever asks why there is no rest."""
        return [str(each) for each in self._ready]  # type: ignore[attr-defined]

    def settle(self) -> None:
        """Run until nothing can happen before time passes, a job is done or a message comes."""
        self._idle.busy = 0
        self.run_forever()
        if self.alarm is not None:
            # It was not meant for the program that it hit: what that program does now says nothing.
            alarm, self.alarm = self.alarm, None
            raise alarm

    def _make_task(self, loop: Any, work: Any, **options: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(work, loop=loop, **options)
        self.tasks[task] = OWNER.get(None)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self.tasks.pop(task, None)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None and not isinstance(error, Exception) and self.alarm is None:
            self.alarm = error
            self.stop()

    def run_in_executor(self, executor: Any, work: Any, *arguments: Any) -> Any:
        owner, future = OWNER.get(None), self.create_future()
        context = contextvars.copy_context()
        # The default executor has many threads; ours have one each. Numbers, as ids are given twice.
        lane = next(self._lanes) if executor is None else self._lane_of.setdefault(executor, next(self._lanes))
        job = Job(owner, lane, lambda: context.run(work, *arguments), future)
        self.jobs.setdefault((id(owner), lane), deque()).append(job)
        return future

    def pending_jobs(self) -> Iterator[Job]:
        """The next job of every executor, in the order of their creation."""
        for key in [key for key, queue in self.jobs.items() if not queue]:
            del self.jobs[key]
        for queue in self.jobs.values():
            yield queue[0]

    def perform(self, job: Job) -> None:
        """Do one of `pending_jobs`."""
        queue = self.jobs[id(job.owner), job.lane]
        assert queue.popleft() is job
        job.perform()

    def end(self, owner: object) -> None:
        """What kill -9 leaves of a process: no task, and no job that has not begun."""
        for key in [key for key, queue in self.jobs.items() if queue and queue[0].owner is owner]:
            del self.jobs[key]
        mine = [task for task, whose in self.tasks.items() if whose is owner]
        for task in mine:
            task.cancel()
        for _ in range(50):
            self.settle()
            # What closes files at the end is not the program's work any more.
            for key in [key for key, queue in self.jobs.items() if queue and queue[0].owner is owner]:
                for job in self.jobs.pop(key):
                    job.perform()
            mine = [task for task, whose in self.tasks.items() if whose is owner]
            if not mine:
                return
        raise AssertionError(f"does not end: {mine}")
