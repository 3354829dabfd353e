"""The tree: everyone has a way up, levels halve, names may stand in topics."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetfed.cloud_coordinator.demo.topology import MAX_TIERS, plan
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.wire.topics import CLOUD_SITE, check_id


@given(gateways=st.integers(1, 20), extra=st.integers(0, 30), tiers=st.integers(1, MAX_TIERS))
def test_every_device_reaches_the_cloud_over_as_many_gateways_as_there_are_tiers(
    gateways: int, extra: int, tiers: int
) -> None:
    tree = plan(devices=gateways + extra, gateways=gateways, tiers=tiers)
    above = {place.site: place.upstream for place in tree.gateways}
    assert len(above) == len(tree.gateways), "two gateways serve one site"
    for device in tree.devices:
        site, hops = device.site, 0
        while site != CLOUD_SITE:
            site, hops = above[site], hops + 1
        assert hops == tiers
    assert tree.tiers == tiers
    names = [place.id for place in (*tree.gateways, *tree.devices)]
    assert len(set(names)) == len(names)
    assert all(check_id(name) for name in (*names, *above))
    leaves = {place.site for place in tree.gateways if place.level == 0}
    assert {device.site for device in tree.devices} == leaves


def test_a_small_one_by_hand() -> None:
    tree = plan(devices=3, gateways=3, tiers=2)
    assert [(place.id, place.upstream, place.level) for place in tree.gateways] == [
        ("g-north", "area-1", 0),
        ("g-south", "area-1", 0),
        ("g-east", "area-2", 0),
        ("g-area-1", "_", 1),
        ("g-area-2", "_", 1),
    ]


@pytest.mark.parametrize(("devices", "gateways", "tiers"), [(1, 2, 1), (0, 0, 1), (4, 2, 0), (4, 2, MAX_TIERS + 1)])
def test_trees_that_cannot_be(devices: int, gateways: int, tiers: int) -> None:
    with pytest.raises(ConfigError):
        plan(devices=devices, gateways=gateways, tiers=tiers)
