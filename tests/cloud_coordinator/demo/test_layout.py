"""The folder of a run: what is written is what each role reads, and nothing of anybody else's is touched."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetfed.broker.config import load_config as load_broker
from fleetfed.cloud_coordinator.config import CoordinatorConfig
from fleetfed.cloud_coordinator.control.client import OperatorConfig
from fleetfed.cloud_coordinator.demo import layout, topology
from fleetfed.cloud_coordinator.demo.fleet import Fleet
from fleetfed.cloud_coordinator.demo.layout import Folder, Settings, toml
from fleetfed.cloud_coordinator.helper.config import load as load_helper
from fleetfed.device.config import load as load_device
from fleetfed.gateway.config import load as load_gateway
from fleetfed.shared.clock import unix_ms
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.trust.identity import Identity

_SCALARS = st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False, allow_infinity=False) | st.text()
_KEYS = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)
_TABLES = st.recursive(
    st.dictionaries(_KEYS, _SCALARS | st.lists(st.integers(0, 9), max_size=3), max_size=4),
    lambda inner: st.dictionaries(_KEYS, inner | _SCALARS, max_size=3),
    max_leaves=10,
)


@given(table=_TABLES)
def test_toml_reads_back_as_it_was(table: dict[str, object]) -> None:
    assert tomllib.loads(toml(table)) == table


def test_every_role_reads_its_settings(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "run")
    folder.prepare()
    tree = topology.plan(devices=3, gateways=2, tiers=2)
    keyring = layout.make_keys(folder, tree, now=unix_ms())
    layout.write_broker(folder, keyring)
    (folder.path / "model.tflite").write_bytes(b"x")
    settings = Settings(
        model=folder.path / "model.tflite",
        validation=tmp_path / "validation.npz",
        data={place.id: {"path": "data.npz", "holdout": 0.1} for place in tree.devices},
        rounds={"rounds": 2, "start_when": 3, "training": {"epochs": 2}},
        tables={"clips": {"bits": 4}, "patch": {"bits": 4}},
    )
    layout.write_roles(folder, tree, settings, port=4242)

    assert load_broker(folder.config("broker")).tls is not None
    coordinator = CoordinatorConfig.load(folder.config("coordinator"))
    assert (coordinator.rounds.training.epochs, coordinator.broker.port, coordinator.autostart) == (2, 4242, True)
    assert Identity.load(coordinator.identity, role=Role.COORDINATOR)
    for gateway in tree.gateways:
        read = load_gateway(folder.config(gateway.id))
        assert read.upstream.site == gateway.upstream
        assert Identity.load(read.identity, role=Role.GATEWAY).certificate.site == gateway.site
    for device in tree.devices:
        settings_read = load_device(folder.config(device.id))
        assert settings_read.data.path == folder.role(device.id) / "data.npz"
        assert Identity.load(settings_read.identity, role=Role.DEVICE).certificate.site == device.site
    operator = OperatorConfig.load(folder.path / "operator.toml")
    assert Identity.load(operator.identity, role=Role.OPERATOR).certificate.id == layout.OPERATOR
    folder.release()


async def test_who_is_to_answer_prometheus_is_in_its_settings_and_in_one_file(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "run")
    folder.prepare()
    tree = topology.plan(devices=2, gateways=1, tiers=1)
    fleet = Fleet(folder, tree, broker="embedded", helper=True, metrics=True)
    assert set(fleet.listens) == {"coordinator", "helper", "broker", "g-north"}
    assert len(set(fleet.listens.values())) == 4
    assert "broker" not in Fleet(folder, tree, broker="mosquitto", metrics=True).listens
    assert not Fleet(folder, tree, broker="embedded").listens
    keyring = layout.make_keys(folder, tree, now=unix_ms(), helper=True)
    layout.write_broker(folder, keyring, listen=fleet.listens["broker"])
    (folder.path / "model.tflite").write_bytes(b"x")
    settings = Settings(
        model=folder.path / "model.tflite",
        validation=None,
        data={place.id: {} for place in tree.devices},
        rounds={"rounds": 2},
        listens=fleet.listens,
    )
    layout.write_roles(folder, tree, settings, port=4242, helper=True)
    assert load_broker(folder.config("broker")).monitoring.listen == fleet.listens["broker"]
    assert load_gateway(folder.config("g-north")).monitoring.listen == fleet.listens["g-north"]
    assert load_helper(folder.config("helper")).monitoring.listen == fleet.listens["helper"]
    coordinator = CoordinatorConfig.load(folder.config("coordinator"))
    assert coordinator.monitoring.listen == fleet.listens["coordinator"]
    targets = json.loads(layout.write_targets(folder, tree, fleet.listens).read_text())
    assert [each["labels"]["role"] for each in targets] == ["coordinator", "gateway", "helper", "broker"]
    assert targets[1] == {"targets": [fleet.listens["g-north"]], "labels": {"role": "gateway", "site": "north"}}
    folder.release()


def test_an_earlier_run_is_replaced(tmp_path: Path) -> None:
    for _ in range(2):
        folder = Folder(tmp_path / "run")
        folder.prepare()
        assert [path.name for path in folder.path.iterdir()] == [".fleetfed-demo"]
        (folder.path / "logs").mkdir()
        (folder.path / "report.json").write_text("{}")
        folder.release()


def test_what_is_no_demo_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="no earlier demo"):
        Folder(tmp_path).prepare()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    one, two = Folder(tmp_path / "run"), Folder(tmp_path / "run")
    one.prepare()
    (one.path / "keys").mkdir()
    with pytest.raises(ConfigError, match="another demo"):
        two.prepare()
    assert (one.path / "keys").exists()
    one.release()
    two.prepare()
    two.release()
