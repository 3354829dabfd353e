"""The coordinator's settings."""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path

import pytest

from fleetfed.cloud_coordinator import config
from fleetfed.cloud_coordinator.config import CoordinatorConfig
from fleetfed.shared.errors import ConfigError


def load(tmp_path: Path, text: str) -> CoordinatorConfig:
    path = tmp_path / "coordinator.toml"
    path.write_text(text)
    return CoordinatorConfig.load(path)


BASE = 'identity = "i"\nstate = "s"\n[broker]\nhost = "localhost"\n'


def test_the_documented_example_loads(tmp_path: Path) -> None:
    document = inspect.getdoc(config)
    assert document is not None
    loaded = load(tmp_path, textwrap.dedent(document.split("Example::")[1]))
    assert loaded.rounds.training.epochs == 2
    assert loaded.state == tmp_path / "state"
    assert loaded.model is not None
    assert loaded.model.card_file == tmp_path / "digits.card"
    assert loaded.connection("c").tls is not None
    assert loaded.database_url == f"sqlite:///{tmp_path}/state/coordinator.db"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[rounds]\nexpires = 5.0\ndeadline = 6.0\n", "must be later than deadline"),
        ("[rounds]\nquorum_minimum = 20\ncohort_cap = 10\n", "more than cohort_cap"),
        ("[patch]\nbits = 12\n", "bits must be 2 to 8 or 16"),
        ("[storage]\nfull_every = 17\n", "not between 1 and 16"),
        ("[rounds.training]\nepoch = 2\n", "did you mean 'epochs'"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(tmp_path, BASE + text)


def test_a_broker_elsewhere_needs_tls(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only for a broker on this machine"):
        load(tmp_path, BASE.replace("localhost", "broker.example.org") + "tls = false\n")


SPLIT = '[rounds]\nmode = "split"\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bucket = 4\n", "bucket 4 is less than minimum_cohort 5: .* raise bucket"),
        ("minimum_cohort = 6\ncohort_cap = 5\nquorum_minimum = 5\n", "more than cohort_cap 5: .* raise cohort_cap"),
        ("minimum_owners = 6\n", "minimum_owners 6 is more than minimum_cohort 5: .* raise minimum_cohort"),
        ("bucket = 200\ncohort_cap = 100\n", "bucket 200 is more than cohort_cap 100"),
        ('robust = "trimmed_mean"\n', "there are none: set bucket, to at least 5"),
        ("seed_holders = 3\n", "not between 1 and 2"),
        ("suite = 2\n", "suite 2 is unknown: set 1"),
        ("minimum_cohort = 1\n", "not between 2 and"),
        ('robust = "mean"\n', "robust"),
    ],
)
def test_split_settings_that_cannot_work_are_refused_with_what_to_do(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(tmp_path, BASE + SPLIT + text)


@pytest.mark.parametrize(
    "text", ["bucket = 64\n", "seed_holders = 2\n", "suite = 3\n", 'robust = "geometric_median"\n']
)
def test_what_only_split_mode_has_is_refused_in_plain_mode(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"is for split mode: set .* = .*, or mode = 'split'"):
        load(tmp_path, BASE + "[rounds]\n" + text)


def test_split_settings_load(tmp_path: Path) -> None:
    text = 'minimum_cohort = 20\nbucket = 64\nseed_holders = 2\nrobust = "trimmed_mean"\ntrim = 0.25\n'
    rounds = load(tmp_path, BASE + SPLIT + text).rounds
    assert rounds.needs_helper
    assert (rounds.minimum_cohort, rounds.bucket, rounds.robust.value, rounds.trim) == (20, 64, "trimmed_mean", 0.25)
