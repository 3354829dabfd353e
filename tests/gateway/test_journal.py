"""The journal as a file: what one transaction takes in comes out again, however its rows were joined."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetfed.gateway.journal import Journal, Rows
from fleetfed.gateway.pipeline import ROOM, Pipeline

_INSERT = "INSERT INTO updates VALUES (?, ?, ?, ?, ?, ?, ?, ?)"


def _update(number: int, size: int = 10) -> Rows:
    id = number.to_bytes(16, "big")
    return [
        (_INSERT, (id, f"d-{number}", "1", bytes(32), b"head %d" % number, bytes(size), b"receipt %d" % number, ""))
    ]


@given(st.lists(st.booleans(), max_size=80))
def test_any_number_of_updates_between_other_rows_is_stored_whole(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[bool]
) -> None:
    journal = Journal(tmp_path_factory.mktemp("journal") / "journal.db")
    batch: Rows = []
    for number, is_update in enumerate(kinds):
        batch += _update(number) if is_update else [("INSERT OR REPLACE INTO facts VALUES (?, ?)", (f"f{number}", 1))]
    journal.write(batch)
    wanted = {number.to_bytes(16, "big"): b"head %d" % number for number, update in enumerate(kinds) if update}
    assert journal.heads() == wanted
    assert all(journal.receipt(id) == head.replace(b"head", b"receipt") for id, head in wanted.items())
    journal.close()


class _Held:
    """An executor whose work is done when the test says so."""

    def __init__(self) -> None:
        self.asked: list[tuple[Future[None], object, object]] = []

    def submit(self, work: object, *arguments: object) -> Future[None]:
        future: Future[None] = Future()
        self.asked.append((future, work, arguments))
        return future

    def finish(self) -> None:
        self.asked.pop(0)[0].set_result(None)


async def test_nothing_more_is_taken_in_while_the_disk_is_behind(tmp_path: Path) -> None:
    disk = _Held()
    journal = Journal(tmp_path / "journal.db")
    pipeline = Pipeline(journal, disk)  # type: ignore[arg-type]
    running = asyncio.create_task(pipeline.run())
    await pipeline.room()
    pipeline.store(_update(1, ROOM))
    waiting = asyncio.create_task(pipeline.room())
    for _ in range(5):
        await asyncio.sleep(0)
    assert not waiting.done()
    disk.finish()
    await waiting
    running.cancel()
    journal.close()
