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
