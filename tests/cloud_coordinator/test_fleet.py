"""Who counts as there, whatever a broker retained and in whatever order it says so."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from fleetfed.cloud_coordinator.fleet import MAX_GATEWAYS, Fleet
from fleetfed.shared.wire.messages import Census, Life, Presence

READY = Presence(life=Life.READY, session=1, since=1, software="test 1")


def census(site: str) -> Census:
    return Census(
        site=site,
        level=0,
        devices=3,
        ready=3,
        sleeping=0,
        lost=0,
        members=(),
        truncated=False,
        model_version=1,
        round=0,
        answered=0,
        expected=0,
    )


@pytest.mark.parametrize("order", list(itertools.permutations(("presence", "refused", "other"))))
def test_a_revoked_gateway_is_not_there_in_whatever_order_its_words_come(order: tuple[str, ...]) -> None:
    fleet = Fleet()
    fleet.census("g-good", census("south"), 2)
    said: dict[str, Callable[[], object]] = {
        "presence": lambda: fleet.presence("g-bad", READY),
        "refused": lambda: fleet.expel("g-bad"),
        "other": lambda: fleet.presence("g-good", READY),
    }
    for what in order:
        said[what]()
    assert fleet.summary().gateways == {"g-good"}
    assert fleet.life("g-bad") is Life.DISCONNECTED
    assert fleet.summary().devices == 3


def test_one_that_got_another_certificate_is_back() -> None:
    fleet = Fleet()
    fleet.expel("g-north")
    fleet.presence("g-north", READY)
    assert fleet.census("g-north", census("north"), 7)
    assert fleet.summary().gateways == {"g-north"}
    assert fleet.revoke({7})
    assert fleet.summary().gateways == frozenset()


def test_only_so_many_that_nobody_knows_are_remembered() -> None:
    fleet = Fleet()
    for number in range(MAX_GATEWAYS + 10):
        fleet.expel(f"g-{number}")
    assert len(fleet._expelled) == MAX_GATEWAYS
    fleet.presence("g-north", READY)
    assert fleet.expel("g-north"), "one that is known is always put out"
