"""What needs no host: argument specs, units, secrets, and the filter that writes settings."""

from __future__ import annotations

import importlib.util
import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fleetfed.shared.version import VERSION

COLLECTION = Path(__file__).parents[2] / "ansible"
ROLES = tuple(sorted(path.name for path in (COLLECTION / "roles").iterdir()))
SECRET = re.compile(r"token|password|pki_packed")

_spec = importlib.util.spec_from_file_location("fleetfed_toml", COLLECTION / "plugins" / "filter" / "toml.py")
assert _spec is not None
assert _spec.loader is not None
_toml = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_toml)


def _load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def _options(role: str) -> dict[str, dict[str, Any]]:
    specs = _load(COLLECTION / "roles" / role / "meta" / "argument_specs.yml")["argument_specs"]
    options: dict[str, dict[str, Any]] = specs["main"]["options"]
    return options


def _tasks(items: Any) -> Iterator[dict[str, Any]]:
    for task in items:
        yield task
        for inner in ("block", "rescue", "always"):
            yield from _tasks(task.get(inner, ()))


def _files(pattern: str) -> list[Path]:
    return sorted((COLLECTION / "roles").glob(pattern))


# --- Argument specs ---------------------------------------------------------------------------------------------------


def test_all_roles_that_are_asked_for_are_there() -> None:
    assert {"common", "pki", "broker", "gateway", "device", "coordinator", "monitoring"} <= set(ROLES)


@pytest.mark.parametrize("role", ROLES)
def test_the_defaults_in_the_specs_are_the_defaults(role: str) -> None:
    specified = {name: option["default"] for name, option in _options(role).items() if "default" in option}
    assert specified == _load(COLLECTION / "roles" / role / "defaults" / "main.yml")


@pytest.mark.parametrize("role", ROLES)
def test_an_option_without_a_default_is_required(role: str) -> None:
    for name, option in _options(role).items():
        assert option.get("required", False) is ("default" not in option), name


@pytest.mark.parametrize("role", ROLES)
def test_every_option_is_the_roles_own_described_and_of_a_type_that_suits_its_default(role: str) -> None:
    kinds = {"str": str, "path": str, "int": int, "bool": bool, "list": list, "dict": dict}
    for name, option in _options(role).items():
        assert name.startswith(("enroller_" if role == "enroller" else f"{role}_",)), name
        assert option["description"], name
        default = option.get("default", "")
        # What Jinja makes has its type only when it is run.
        assert isinstance(default, kinds[option["type"]]) or "{{" in str(default) or "default" not in option, name
        assert ("elements" in option) is (option["type"] == "list"), name


@pytest.mark.parametrize("role", ROLES)
def test_every_option_does_something(role: str) -> None:
    texts = [
        path.read_text()
        for path in [*(COLLECTION / "roles").rglob("*"), *(COLLECTION / "playbooks").iterdir()]
        if path.is_file() and path.name not in ("argument_specs.yml",)
    ]
    for name in _options(role):
        # Once in the defaults, unless it is required; once where it is used.
        uses = sum(len(re.findall(rf"\b{name}\b", text)) for text in texts)
        assert uses > ("default" in _options(role)[name]), name


# --- Safety -----------------------------------------------------------------------------------------------------------


def test_every_unit_is_confined() -> None:
    wanted = {
        "NoNewPrivileges=yes",
        "CapabilityBoundingSet=",
        "ProtectSystem=strict",
        "ProtectHome=yes",
        "PrivateTmp=yes",
        "PrivateUsers=yes",
        "PrivateDevices=yes",
        "ProtectKernelTunables=yes",
        "ProtectProc=invisible",
        "RestrictNamespaces=yes",
        "RestrictSUIDSGID=yes",
        "SystemCallFilter=@system-service",
        "StateDirectoryMode=0700",
    }
    units = [path for path in _files("*/templates/*service.j2") if path.name != "reload.service.j2"]
    assert len(units) == 2
    for path in units:
        text = path.read_text()
        assert wanted <= set(text.splitlines()), path
        assert "User=" in text
        assert "MemoryMax=" in text
        assert "User=root" not in text


def test_what_a_timer_starts_is_a_unit_that_a_role_writes_and_is_seen_to_fail() -> None:
    timers = _files("*/templates/*.timer.j2")
    assert timers
    for path in timers:
        name = f"fleetfed-{path.parents[1].name}-{path.name.partition('.')[0]}"
        tasks = [task for each in _files(f"{path.parents[1].name}/tasks/*.yml") for task in _tasks(_load(each))]
        (unit,) = [
            service
            for task in tasks
            if (service := task.get("vars", {}).get("common_service")) and service["name"] == name
        ]
        # A run that is repeated at once is never seen to have failed, and one without an end blocks the next.
        assert (unit["type"], unit["restart"], unit["install"]) == ("oneshot", "no", False)
        assert any(line.startswith("TimeoutStartSec=") for line in unit["service"])
        assert "Persistent=true" in path.read_text().splitlines()


def test_what_handles_a_secret_is_not_logged() -> None:
    seen = 0
    for path in [*_files("*/tasks/*.yml"), *sorted((COLLECTION / "playbooks").glob("*.yml"))]:
        items = _load(path)
        plays = [task for play in items if "hosts" in play for task in play.get("tasks", ())]
        for task in _tasks(plays or [each for each in items if "hosts" not in each]):
            module: Mapping[str, Any] = {k: v for k, v in task.items() if k.startswith("ansible.builtin.")}
            said = str({k: v for k, v in module.items() if k.rpartition(".")[2] in ("copy", "command", "shell")})
            makes = "'token', 'create'" in said or "pki_packed.stdout" in said or "tar -C" in said
            writes = "content" in said and SECRET.search(said.split("'dest'")[0])
            if makes or writes:
                seen += 1
                assert task.get("no_log") is True, f"{path}: {task['name']}"
    assert seen >= 6


def test_no_secret_is_in_the_example() -> None:
    inventory = COLLECTION / "inventories" / "example"
    assert not (inventory / "group_vars" / "all" / "vault.yml").exists()
    for path in inventory.rglob("*.yml"):
        assert not re.search(r"(password|token):(?! *\"\{\{ vault_)", path.read_text()), path


def test_the_collection_has_the_packages_version() -> None:
    assert _load(COLLECTION / "galaxy.yml")["version"] == VERSION


# --- Settings ---------------------------------------------------------------------------------------------------------

_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_scalars = st.one_of(_texts, st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False))
_values = st.recursive(
    _scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_texts, inner, max_size=3)),
    max_leaves=8,
)


@given(st.dictionaries(_texts, _values, max_size=5))
def test_settings_are_read_as_they_were_written(table: dict[str, Any]) -> None:
    assert tomllib.loads(_toml.to_toml(table)) == table


def test_an_entry_that_is_none_is_left_out() -> None:
    assert tomllib.loads(_toml.to_toml({"a": None, "b": {"c": None, "d": 1}})) == {"b": {"d": 1}}


def test_an_infinite_number_is_written_as_toml_has_it() -> None:
    assert tomllib.loads(_toml.to_toml({"a": math.inf})) == {"a": math.inf}


@pytest.mark.parametrize("value", [[1], "text", {"a": object()}, {"a": [None]}])
def test_what_toml_cannot_say_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"to_toml needs|TOML has no"):
        _toml.to_toml(value)
