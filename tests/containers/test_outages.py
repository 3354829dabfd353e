"""What the fleet of docker-compose.yml guarantees when uplinks break and containers are killed.

A receipt tells a device that its update was accepted; each must be counted in exactly one version, once. The protocol
has one exception: a site that comes back while a round is open that did not wait for it takes part, and the round may
be closed before its proposal is there.
"""

from __future__ import annotations

import time
from functools import partial

import pytest
from fleetfed_testing.composed import DEVICES, NORTH, Composed

pytestmark = [pytest.mark.docker, pytest.mark.timeout(3600)]

OUTAGE = 60.0
NOTICED = 30.0
"""Seconds until the coordinator must know that a site is away: the bridge's keep-alive is 10 s, noticed after 15."""


def test_the_edge_goes_on_without_the_cloud_and_nothing_is_lost_or_counted_twice(composed: Composed) -> None:
    """1. a round is open, its plan is at the site; 2. the uplink is cut; 3. the site's devices train and hold receipts;
    4. the gateway is killed and started again; 5. after a minute the uplink is back; 6. the round has all six.
    """
    composed.pause()
    number = composed.open_round()
    composed.cut("north")
    cut_at = time.monotonic()
    composed.wake(*NORTH)

    composed.until("receipts from the edge", lambda: all(number in composed.accepted(name) for name in NORTH))
    print(f"three receipts at the cut site {time.monotonic() - cut_at:.1f} s after the cut")
    assert composed.round()["round"] == number
    assert composed.history(number) is None, "the cloud cannot have closed it"

    composed.until("the coordinator to know", lambda: composed.round()["gateways_ready"] == 1, NOTICED)
    print(f"the cloud knows {time.monotonic() - cut_at:.1f} s after the cut")
    composed.kill("north-gateway")
    composed.until("the round again", lambda: f"round {number} goes on" in composed.log("north-gateway"))
    time.sleep(max(0.0, OUTAGE - (time.monotonic() - cut_at)))
    composed.mend("north")
    taken = composed.until("the round's end", lambda: composed.history(number), 90)
    print(f"round {number} closed {taken:.1f} s after the uplink was back")
    row = composed.history(number)
    assert row is not None
    assert (row["outcome"], row["contributors"]) == ("committed", 6)
    composed.until("both sites", lambda: composed.round()["gateways_ready"] == 2)
    check_the_books(composed)


def test_a_gateway_that_is_killed_in_a_round_keeps_what_it_accepted(composed: Composed) -> None:
    """1. one device of the site holds a receipt; 2. its gateway is killed; 3. the others wake up; 4. it has all."""
    composed.pause()
    number = composed.open_round()
    first, *rest = NORTH
    composed.wake(first)
    composed.until("a receipt", lambda: number in composed.accepted(first))
    assert composed.history(number) is None
    composed.kill("north-gateway")
    killed_at = time.monotonic()
    composed.wake(*rest)
    composed.until("the round's end", lambda: composed.history(number), 90)
    print(f"round {number} closed {time.monotonic() - killed_at:.1f} s after the gateway was killed")
    row = composed.history(number)
    assert row is not None
    assert (row["outcome"], row["contributors"]) == ("committed", 6)
    check_the_books(composed)


def test_no_round_waits_for_a_site_that_is_away(composed: Composed) -> None:
    composed.pause()
    composed.cut("south")
    noticed = composed.until("the coordinator to know", lambda: composed.round()["gateways_ready"] == 1, NOTICED)
    print(f"noticed {noticed:.1f} s after the cut")
    number = composed.round()["round"]
    composed.operator("round", "resume")
    # A round's deadline is 120 s.
    taken = composed.until("rounds of the other site", lambda: composed.round()["round"] >= number + 3, 40)
    print(f"three rounds of one site in {taken:.1f} s")
    of_one_site = (composed.history(number + 1), composed.history(number + 2))
    assert [row and row["contributors"] for row in of_one_site] == [3, 3]
    composed.mend("south")
    composed.until("both sites", lambda: composed.round()["gateways_ready"] == 2, NOTICED)
    composed.until("a round of both", lambda: composed.round()["history"][-1]["contributors"] == 6)
    check_the_books(composed)


@pytest.mark.parametrize("service", ["north-gateway", "north-broker", "cloud-broker", "coordinator", "postgres"])
def test_a_container_that_is_killed_brings_everything_back(composed: Composed, service: str) -> None:
    before = composed.round()["round"]
    composed.kill(service)
    taken = composed.until("rounds of all", partial(all_take_part_after, composed, before + 1), 150)
    print(f"a round of all that opened after {service} was killed was over in {taken:.1f} s")
    check_the_books(composed)


def all_take_part_after(composed: Composed, number: int) -> bool:
    return any(row["round"] > number and row["contributors"] == 6 for row in composed.round()["history"])


def check_the_books(composed: Composed) -> None:
    """Each receipt of a round that awaited its site is counted, nothing without one is; all hold the newest file."""
    composed.pause()
    history = {row["round"]: row["contributors"] for row in composed.round()["history"]}
    accepted = {name: composed.accepted(name) for name in DEVICES}
    awaited = composed.awaited()
    owed = {name: {each for each in accepted[name] if site(name) in awaited[each]} for name in DEVICES}
    counted = composed.counted()
    for name in DEVICES:
        assert len(owed[name]) <= counted[member(name)] <= len(accepted[name]), (name, accepted[name] - owed[name])
    for number, contributors in history.items():
        least, most = (sum(number in rounds for rounds in each.values()) for each in (owed, accepted))
        assert least <= contributors <= most, number
    newest = composed.newest()
    for name in DEVICES:
        composed.until(f"{name} to hold the newest version", partial(holds, composed, name, newest))
    receipts, total = sum(map(len, accepted.values())), sum(counted.values())
    print(f"{len(awaited)} rounds, {receipts} receipts, {total} counted, {receipts - total} late; all hold one file")
    composed.operator("round", "resume")


def holds(composed: Composed, name: str, digest: str) -> bool:
    return composed.held(name) == digest


def site(device: str) -> str:
    return device.split("-")[0]


def member(device: str) -> str:
    """The id of the device in a container."""
    place, _, number = device.split("-")
    return f"d-{place}-{number}"
