"""What a demo's tree allows."""

from __future__ import annotations

import pytest

from fleetfed.cloud_coordinator.demo import topology
from fleetfed.cloud_coordinator.demo.privacy import Level, choose
from fleetfed.shared.errors import ConfigError


def test_updates_are_masked_unless_a_site_has_one_device_only() -> None:
    tree = topology.plan(devices=10, gateways=2, tiers=1)
    private = choose("", tree, fraction=1.0)
    assert (private.level, private.minimum_cohort, private.note) == (Level.SPLIT, 5, "")
    assert private.rounds(tree) == {"mode": "split", "minimum_cohort": 5, "seed_holders": 1, "cohort_cap": 10}
    lonely = topology.plan(devices=3, gateways=2, tiers=1)
    private = choose("", lonely, fraction=1.0)
    assert private.level is Level.PLAIN
    assert "--devices" in private.note
    assert private.rounds(lonely) == {}


@pytest.mark.parametrize("asked", [Level.SPLIT, Level.HELPER])
def test_asking_for_what_cannot_be_is_an_error_that_helps(asked: Level) -> None:
    with pytest.raises(ConfigError, match="at least 4 devices"):
        choose(asked, topology.plan(devices=3, gateways=2, tiers=1), fraction=1.0)


def test_a_fraction_leaves_room_for_chance() -> None:
    tree = topology.plan(devices=40, gateways=2, tiers=1)
    assert choose("helper", tree, fraction=0.5).minimum_cohort == 5


@pytest.mark.parametrize("level", Level)
def test_every_level_says_who_could_learn_what(level: Level) -> None:
    private = choose(level, topology.plan(devices=10, gateways=2, tiers=1), fraction=1.0)
    said = private.who_learned_what()
    assert said.startswith("Privacy: ")
    assert "\n" not in said
    assert ("5 devices or more" in said) == (level is not Level.PLAIN)
