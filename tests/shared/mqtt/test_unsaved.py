"""What a killed broker forgot of what it had confirmed is said again; what is safe is not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from fleetfed_testing.brokers import Mosquitto
from fleetfed_testing.waiting import PATIENCE, eventually
from hypothesis import given
from hypothesis import strategies as st

from fleetfed.shared.mqtt.session import Session
from fleetfed.shared.mqtt.unsaved import Unsaved


def test_only_the_last_seconds_are_in_doubt() -> None:
    unsaved = Unsaved(window=10)
    unsaved.confirmed("a", b"old", 1, 0)
    unsaved.confirmed("b", b"new", 1, 5)
    unsaved.lost(11)
    assert unsaved.doubtful() == [("b", b"new", 1)]


def test_a_topic_retains_its_last_message() -> None:
    unsaved = Unsaved(window=10)
    unsaved.confirmed("a", b"1", 1, 0)
    unsaved.confirmed("b", b"2", 1, 1)
    unsaved.confirmed("a", b"3", 1, 2)
    unsaved.lost(3)
    assert unsaved.doubtful() == [("b", b"2", 1), ("a", b"3", 1)]


def test_a_message_never_comes_after_the_one_that_was_to_replace_it() -> None:
    unsaved = Unsaved(window=10)
    unsaved.confirmed("a", b"old", 1, 0)
    unsaved.begun("a")
    unsaved.lost(1)
    # Whether the broker has the new one is for its sender to find out.
    assert unsaved.doubtful() == []


def test_what_could_not_be_said_again_stays_in_doubt() -> None:
    unsaved = Unsaved(window=10)
    unsaved.confirmed("a", b"1", 1, 0)
    unsaved.confirmed("b", b"2", 1, 0)
    unsaved.lost(1)
    unsaved.confirmed("a", b"1", 1, 50)
    unsaved.lost(100)
    assert unsaved.doubtful() == [("b", b"2", 1)]


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 8)), max_size=30))
def test_memory_is_bounded_and_the_newest_stay(messages: list[tuple[str, int]]) -> None:
    unsaved = Unsaved(window=1000, limit=10)
    for now, (topic, size) in enumerate(messages):
        unsaved.confirmed(topic, bytes(size), 1, now)
    unsaved.lost(len(messages))
    kept = unsaved.doubtful()
    assert sum(len(payload) for _, payload, _ in kept) <= 10
    last = dict(messages)
    assert all(len(payload) == last[topic] for topic, payload, _ in kept)
    if messages:
        assert kept[-1][0] == messages[-1][0]


@pytest.mark.mosquitto
async def test_a_broker_that_was_killed_before_it_wrote_gets_its_retained_messages_again(
    mosquitto_broker: Callable[..., Mosquitto], tmp_path: Path
) -> None:
    never = f"persistence true\npersistence_location {tmp_path}/\nautosave_on_changes false\nautosave_interval 3600"
    broker = mosquitto_broker(extra=never)
    one = Session(broker.config("d-1"))
    running = asyncio.create_task(one.run())
    await asyncio.wait_for(one.wait_connected(), PATIENCE)
    await one.publish("plan", b"seven", retain=True)
    broker.kill()
    broker.start()
    await eventually(lambda: one.statistics().connects == 2 and one.connected)
    heard: list[bytes] = []

    async def hear(_: str, payload: bytes, retained: bool) -> None:
        heard.append(payload)

    two = Session(broker.config("d-2"), subscriptions=["plan"], on_message=hear)
    listening = asyncio.create_task(two.run())
    await eventually(lambda: heard == [b"seven"])
    for task in (running, listening):
        task.cancel()
    await asyncio.gather(running, listening, return_exceptions=True)
