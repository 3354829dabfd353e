"""Presence, stale wills and the census."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetfed.gateway.members import CENSUS_MEMBERS, Members
from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.wire import codec, limits
from fleetfed.shared.wire.messages import Census, Life, MemberSummary, Presence
from fleetfed.shared.wire.topics import Kind


def ready(session: int = 1, serial: int = 0) -> Presence:
    return Presence(life=Life.READY, session=session, since=5, software="device 1", serial=serial)


def lost(session: int = 1, serial: int = 0) -> Presence:
    return Presence(life=Life.LOST, session=session, serial=serial)


def test_a_will_of_the_session_before_is_stale() -> None:
    members = Members()
    members.presence(Kind.DEVICE, "d", ready(1), now=0)
    members.presence(Kind.DEVICE, "d", ready(2), now=0)
    with pytest.raises(RemoteProtocolError) as caught:
        members.presence(Kind.DEVICE, "d", lost(1), now=0)
    assert caught.value.reason is RejectReason.REPLAYED
    assert members.life(Kind.DEVICE, "d") is Life.READY
    assert members.presence(Kind.DEVICE, "d", lost(2), now=9)
    assert members.life(Kind.DEVICE, "d") is Life.LOST


def test_a_will_keeps_what_the_birth_said() -> None:
    members = Members()
    members.presence(Kind.DEVICE, "d", ready(), now=0)
    members.presence(Kind.DEVICE, "d", lost(), now=9)
    (summary,) = members.census("north", model_version=0, round=0, answered=0, expected=0).members
    assert summary == MemberSummary(id="d", site="north", life=Life.LOST, since=9, software="device 1")


def test_the_same_again_is_no_news() -> None:
    members = Members()
    assert members.presence(Kind.DEVICE, "d", ready(), now=0)
    assert not members.presence(Kind.DEVICE, "d", ready(), now=1)
    assert members.gone(Kind.DEVICE, "d")
    assert not members.gone(Kind.DEVICE, "d")


def test_only_the_ready_and_the_sleeping_are_awaited() -> None:
    members = Members()
    for life in Life:
        members.presence(Kind.DEVICE, str(life), Presence(life=life, session=1), now=0)
        members.presence(Kind.GATEWAY, str(life), Presence(life=life, session=1), now=0)
    assert set(members.awaited_devices()) == {"ready", "sleeping"}
    assert set(members.ready_gateways()) == {"ready"}


@pytest.mark.parametrize("list_first", [False, True])
def test_who_names_a_revoked_certificate_is_not_there(list_first: bool) -> None:
    members = Members()
    if list_first:
        assert members.revoke(frozenset({7})) == []
    for kind in (Kind.DEVICE, Kind.GATEWAY):
        assert members.presence(kind, "out", ready(serial=7), now=0) is not list_first
        members.presence(kind, "in", ready(serial=8), now=0)
    if not list_first:
        members.census_of("out", below(), now=0)
        assert members.revoke(frozenset({7})) == [(Kind.DEVICE, "out"), (Kind.GATEWAY, "out")]
    assert list(members.awaited_devices()) == list(members.ready_gateways()) == ["in"]
    census = members.census("north", model_version=0, round=0, answered=0, expected=0)
    assert (census.devices, [summary.id for summary in census.members]) == (1, ["in"])
    assert members.revoke(frozenset({7})) == []


def test_who_does_not_name_its_certificate_is_not_revoked() -> None:
    members = Members()
    members.presence(Kind.DEVICE, "d", ready(), now=0)
    assert members.revoke(frozenset({0, 7})) == []
    assert not members.presence(Kind.DEVICE, "d", ready(), now=1)
    assert list(members.awaited_devices()) == ["d"]


def test_a_revoked_member_comes_back_with_another_certificate() -> None:
    members = Members()
    members.presence(Kind.DEVICE, "d", ready(1, serial=7), now=0)
    members.revoke(frozenset({7}))
    assert members.presence(Kind.DEVICE, "d", ready(2, serial=8), now=1)
    with pytest.raises(RemoteProtocolError) as caught:
        members.presence(Kind.DEVICE, "d", lost(1, serial=7), now=2)
    assert caught.value.reason is RejectReason.REPLAYED
    assert list(members.awaited_devices()) == ["d"]


def test_a_will_is_of_the_certificate_that_its_device_has_renewed_since() -> None:
    members = Members()
    members.presence(Kind.DEVICE, "d", ready(serial=7), now=0)
    assert members.presence(Kind.DEVICE, "d", ready(serial=8), now=1), "a new certificate is news"
    members.presence(Kind.DEVICE, "d", lost(serial=7), now=2)
    assert members.revoke(frozenset({7})) == []
    assert members.revoke(frozenset({7, 8})) == [(Kind.DEVICE, "d")]


def test_the_revoked_take_nobodys_place() -> None:
    members = Members(limit=1)
    members.revoke(frozenset({7}))
    members.presence(Kind.DEVICE, "a", ready(serial=7), now=0)
    assert members.presence(Kind.DEVICE, "b", ready(serial=8), now=0)
    assert not members.presence(Kind.DEVICE, "c", ready(serial=7), now=0), "nor is it refused by the limit"


_SAID = st.builds(
    Presence,
    life=st.sampled_from((Life.READY, Life.SLEEPING, Life.DISCONNECTED)),
    session=st.just(1),
    serial=st.integers(0, 4),
)


@given(st.lists(st.integers(0, 4) | st.tuples(st.sampled_from("ab"), st.none() | _SAID), max_size=20))
def test_in_any_order_of_words_and_lists_nobody_waits_for_the_revoked(
    steps: list[int | tuple[str, Presence | None]],
) -> None:
    members, revoked, last = Members(), frozenset[int](), dict[str, Presence]()
    for step in steps:
        if isinstance(step, int):
            revoked |= {step}
            members.revoke(revoked)
            continue
        name, said = step
        if said is None:
            last.pop(name, None)
            members.gone(Kind.DEVICE, name)
        else:
            last[name] = said
            members.presence(Kind.DEVICE, name, said, now=0)
    there = {name: said.life for name, said in last.items() if said.serial == 0 or said.serial not in revoked}
    assert dict(members.lives(Kind.DEVICE)) == there
    awaited = {name for name, life in there.items() if life in (Life.READY, Life.SLEEPING)}
    assert set(members.awaited_devices()) == awaited


def test_more_members_than_the_limit_are_refused() -> None:
    members = Members(limit=2)
    for name in ("a", "b"):
        members.presence(Kind.DEVICE, name, ready(), now=0)
    with pytest.raises(RemoteProtocolError) as caught:
        members.presence(Kind.DEVICE, "c", ready(), now=0)
    assert caught.value.reason is RejectReason.OVERLOADED


def below(level: int = 0, **changes: int) -> Census:
    counts = {"devices": 3, "ready": 2, "sleeping": 1, "lost": 0, **changes}
    return Census(site="south", level=level, **counts)


def test_the_level_is_one_more_than_the_highest_below() -> None:
    members = Members()
    assert members.level == 0
    members.presence(Kind.GATEWAY, "g", ready(), now=0)
    assert members.level == 1
    members.census_of("g", below(level=2), now=0)
    assert members.level == 3


def test_the_census_counts_the_whole_subtree() -> None:
    members = Members()
    members.presence(Kind.DEVICE, "d", ready(), now=0)
    members.census_of("g-1", below(round=4, answered=1, expected=3), now=0)
    members.census_of("g-2", below(round=3, answered=9, expected=9), now=0)
    census = members.census("north", model_version=2, round=4, answered=1, expected=1)
    assert (census.devices, census.ready, census.sleeping, census.lost) == (7, 5, 2, 0)
    assert (census.answered, census.expected) == (2, 4)
    assert not census.truncated


def test_a_census_of_a_large_site_fits_one_packet() -> None:
    members = Members()
    for number in range(3000):
        members.presence(Kind.DEVICE, f"d-{number:040}", ready(), now=0)
    census = members.census("north", model_version=1, round=1, answered=1, expected=3000)
    assert census.truncated
    assert len(census.members) == CENSUS_MEMBERS
    assert census.devices == 3000
    assert len(codec.encode(census)) < limits.MAX_PLAN
