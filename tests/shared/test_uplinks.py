from __future__ import annotations

import pytest

from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.uplinks import Uplinks, parse_link
from fleetfed.shared.wire.messages import Life, Presence


def said(life: Life, session: int = 1) -> Presence:
    return Presence(life=life, session=session, since=5, software="gateway")


@pytest.mark.parametrize(("payload", "up"), [(b"1", True), (b"0", False), (b"", None)])
def test_the_words_of_a_bridge(payload: bytes, up: bool | None) -> None:
    assert parse_link(payload) is up


@pytest.mark.parametrize("payload", [b"2", b"01", b"true", b"\x00", b"0" * 100_000])
def test_other_words_are_malformed(payload: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        parse_link(payload)
    assert caught.value.reason is RejectReason.MALFORMED


def test_who_is_behind_a_broken_link_is_lost_until_it_is_back() -> None:
    links = Uplinks()
    assert links.presence("g", said(Life.READY)) == said(Life.READY)
    assert links.link("g", False) == said(Life.LOST)
    assert links.presence("g", said(Life.READY, 2)) == said(Life.LOST, 2), "a new birth does not mend the link"
    assert links.link("g", True) == said(Life.READY, 2)


def test_the_order_of_both_words_does_not_matter() -> None:
    links = Uplinks()
    assert links.link("g", False) is None, "nothing is known of it yet"
    assert links.presence("g", said(Life.READY)) == said(Life.LOST)


def test_a_link_that_is_no_more_counts_no_more() -> None:
    links = Uplinks()
    links.presence("g", said(Life.READY))
    links.link("g", False)
    assert links.link("g", None) == said(Life.READY)


def test_who_stopped_in_good_order_stays_stopped() -> None:
    links = Uplinks()
    links.presence("g", said(Life.DISCONNECTED))
    assert links.link("g", False) == said(Life.DISCONNECTED)


def test_a_stale_will_is_passed_on_and_forgotten() -> None:
    links = Uplinks()
    links.presence("g", said(Life.READY, 2))
    assert links.presence("g", said(Life.LOST, 1)) == said(Life.LOST, 1), "whoever is told counts it"
    links.link("g", False)
    assert links.link("g", True) == said(Life.READY, 2)


def test_a_cleared_presence_is_forgotten() -> None:
    links = Uplinks()
    links.presence("g", said(Life.READY))
    assert links.presence("g", None) is None
    assert links.link("g", False) is None


def test_memory_is_bounded() -> None:
    links = Uplinks(limit=1)
    links.presence("g-1", said(Life.READY))
    assert links.presence("g-2", said(Life.READY)) == said(Life.READY)
    assert links.link("g-2", False) is None
    assert links.link("g-1", False) == said(Life.READY), "a second link has no room"
