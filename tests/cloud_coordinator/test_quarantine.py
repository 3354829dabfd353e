"""Strikes, quarantine, release."""

from __future__ import annotations

import pytest

from fleetfed.cloud_coordinator.quarantine import Aside, Quarantine, QuarantineConfig
from fleetfed.shared.wire import codec, limits

CONFIG = QuarantineConfig(strikes=3, window=10)


def struck(*rounds: int, device: str = "d-1") -> Quarantine:
    known = Quarantine()
    for number in rounds:
        known = known.note({device: (4.5, "g-1")}, round=number, now=1000 * number, config=CONFIG)
    return known


def test_so_many_strikes_within_the_window_set_a_device_aside() -> None:
    assert not struck(1, 2).aside
    aside = struck(1, 2, 9).aside["d-1"]
    assert (aside.since, aside.round, aside.by) == (9000, 9, "")
    assert aside.reason == "an outlier in 3 of the last 10 rounds (scores 4.5, 4.5, 4.5)"


def test_strikes_wear_off() -> None:
    assert not struck(1, 2, 12).aside
    assert Quarantine() == struck(1).note({}, round=11, now=0, config=CONFIG)


def test_a_released_device_starts_with_no_strikes() -> None:
    known = struck(1, 2, 3).release("d-1")
    assert known == Quarantine()
    assert not known.note({"d-1": (9.0, "g-1")}, round=4, now=0, config=CONFIG).aside
    with pytest.raises(KeyError):
        known.release("d-1")


def test_nobody_is_set_aside_by_a_rule_that_is_off() -> None:
    known = Quarantine()
    for number in range(20):
        known = known.note({"d-1": (99.0, "g-1")}, round=number, now=0, config=QuarantineConfig(strikes=0))
    assert not known.aside


def test_an_operator_may_set_a_device_aside_as_long_as_there_is_room() -> None:
    known = Quarantine().put_aside("d-9", Aside(reason="smoke", since=5, round=1, by="ann"))
    assert known.rows() == [{"device": "d-9", "reason": "smoke", "since": 5, "round": 1, "by": "ann"}]
    aside = Aside(reason="x", since=0, round=0)
    full = Quarantine(aside={f"d-{i}": aside for i in range(limits.MAX_QUARANTINED)})
    with pytest.raises(ValueError, match="revoke"):
        full.put_aside("one-more", aside)


def test_it_survives_the_database() -> None:
    known = struck(1, 2, 3, device="d-2")
    raw = known.encode()
    assert codec.decode(Quarantine, raw, limit=len(raw)) == known
