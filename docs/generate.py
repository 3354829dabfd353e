"""Writes into the documentation what the code already says: state diagrams, topics, messages, reasons.

Each generated part stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``. Run ``python docs/generate.py``
after a change; ``--check`` (a test does it) changes nothing and fails where a part is stale.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import enum
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path

from fleetfed.broker.config import BrokerConfig
from fleetfed.cloud_coordinator.config import CoordinatorConfig
from fleetfed.cloud_coordinator.helper.config import HelperConfig
from fleetfed.cloud_coordinator.helper.state import HelperMachine
from fleetfed.cloud_coordinator.state import CoordinatorMachine
from fleetfed.device.config import DeviceConfig
from fleetfed.device.state import DeviceMachine
from fleetfed.gateway.config import GatewayConfig
from fleetfed.gateway.state import GatewayMachine
from fleetfed.shared import errors
from fleetfed.shared.errors import RejectReason
from fleetfed.shared.machine import Machine
from fleetfed.shared.monitoring import failures
from fleetfed.shared.monitoring.catalog import CATALOG, PORTS
from fleetfed.shared.trust.verifier import SPEAKERS
from fleetfed.shared.wire import defence, masking, messages, privacy, projection, telemetry, topics, trust
from fleetfed.shared.wire.envelope import BODY_LIMITS

DOCS = Path(__file__).parent
_PART = re.compile(r"(<!-- generated: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _enum_docs(module: object, enum: str) -> dict[str, str]:
    """The docstring under each member of an enum, which Python itself does not keep."""
    tree = ast.parse(inspect.getsource(module))  # type: ignore[arg-type]
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == enum)
    found = {}
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            found[node.targets[0].id] = str(text).strip()
    return found


def topic_tables() -> str:
    """Every member topic and broadcast."""
    notes = _enum_docs(topics, "Verb")
    members = [
        (
            f"`ff1/{{fleet}}/{{site}}/{'|'.join(rule.kinds)}/{{id}}/{rule.direction}/{verb}`",
            str(rule.qos),
            "yes" if rule.retain else "",
            notes[verb.name],
        )
        for verb, rule in topics.VERBS.items()
    ]
    notes = _enum_docs(topics, "Broadcast")
    broadcasts = [(f"`ff1/{{fleet}}/{{site}}/b/{what}`", "1", "yes", notes[what.name]) for what in topics.Broadcast]
    blob = ("`ff1/{fleet}/{site}/b/blob/{hash}/{index}`", "1", "yes", "One chunk of a content-addressed object.")
    return table(("topic", "QoS", "retained", "what"), [*members, *broadcasts, blob])


def kind_table() -> str:
    """Every kind of signed message, who may sign it, and its size limit."""
    return table(
        ("code", "kind", "signed by", "largest body, bytes"),
        [
            (
                str(kind.value),
                kind.name.lower(),
                ", ".join(sorted(role.name.lower() for role in roles)),
                str(BODY_LIMITS[kind]),
            )
            for kind, roles in SPEAKERS.items()
        ],
    )


def _hint(hint: object) -> str:
    if typing.get_origin(hint) is typing.Annotated:
        inner, *bounds = typing.get_args(hint)
        said = ", ".join(f"{b.low:g}…{b.high:g}" + (" long" if type(b).__name__ == "Length" else "") for b in bounds)
        return f"{_hint(inner)} ({said})"
    if typing.get_origin(hint) in (tuple, dict):
        inside = ", ".join(_hint(a) for a in typing.get_args(hint) if a is not Ellipsis)
        return f"{'array' if typing.get_origin(hint) is tuple else 'map'} of {inside}"
    if typing.get_args(hint):
        return " or ".join("nil" if a is type(None) else _hint(a) for a in typing.get_args(hint))
    if isinstance(hint, type) and issubclass(hint, str) and hint is not str:
        return "one of " + ", ".join(f"`{m.value}`" for m in hint) if hint is not RejectReason else "a reject reason"  # type: ignore[attr-defined]
    return getattr(hint, "__name__", str(hint)).replace("Any", "anything")


def _own_dataclasses(module: types.ModuleType) -> list[type]:
    found = [each for each in vars(module).values() if isinstance(each, type) and dataclasses.is_dataclass(each)]
    return [each for each in found if each.__module__ == module.__name__]


def message_tables() -> str:
    """Every body, field by field."""
    parts = []
    for cls in (
        each
        for module in (messages, masking, privacy, projection, defence, trust, telemetry)
        for each in _own_dataclasses(module)
    ):
        hints = typing.get_type_hints(cls, include_extras=True)
        rows = [
            (
                f"`{f.name}`",
                _hint(hints[f.name]),
                "yes" if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING else "",
            )
            for f in dataclasses.fields(cls)
        ]
        doc = (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")
        parts.append(f"#### {cls.__name__}\n\n{doc}\n\n" + table(("field", "type", "required"), rows))
    return "\n\n".join(parts)


def reason_table() -> str:
    """Every reason to refuse."""
    notes = _enum_docs(errors, "RejectReason")
    return table(("reason", "meaning"), [(f"`{reason}`", notes[reason.name]) for reason in RejectReason])


def metric_tables() -> str:
    """Every metric, by topic."""
    parts = []
    for topic in dict.fromkeys(metric.topic for metric in CATALOG.values()):
        rows = [
            (
                f"`{metric.name}`",
                str(metric.kind),
                ", ".join(f"`{label}`" for label in metric.labels),
                "all" if len(metric.roles) == len(PORTS) else ", ".join(metric.roles),
                metric.help,
            )
            for metric in CATALOG.values()
            if metric.topic == topic
        ]
        parts.append(f"#### {topic}\n\n" + table(("metric", "kind", "labels", "role", ""), rows))
    return "\n\n".join(parts)


def failure_table() -> str:
    """Every failure mode with its reasons."""
    notes = _enum_docs(failures, "Failure")
    sources: dict[str, Mapping[typing.Any, failures.Failure]] = {
        "rejected": failures.REJECTED,
        "declined": failures.DECLINED,
        "outcome": failures.OUTCOMES,
        "aborted": failures.ABORTS,
        "broker": failures.BROKER,
    }
    rows = []
    for mode in failures.Failure:
        said = [
            f"{source}: " + ", ".join(f"`{reason}`" for reason in reasons)
            for source, known in sources.items()
            if (reasons := [str(reason) for reason, each in known.items() if each is mode])
        ]
        rows.append((f"`{mode}`", notes[mode.name], "; ".join(said)))
    return table(("failure", "", "signs"), rows)


def _diagram(machine: type[Machine[typing.Any]]) -> Callable[[], str]:
    return lambda: f"```mermaid\n{machine.diagram()}\n```"


def _attribute_docs(cls: type) -> dict[str, str]:
    """The ``Attributes:`` of a dataclass and of those that it extends; a shared line counts for each name in it."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        _, _, block = (inspect.cleandoc(each.__dict__.get("__doc__") or "")).partition("Attributes:\n")
        for entry in re.split(r"\n(?=    \S)", block.split("\n\n")[0].strip("\n")):
            names, _, text = entry.strip().partition(": ")
            for name in names.split(","):
                found[name.strip()] = " ".join(text.split())
    return found


def _settings(cls: type, prefix: str = "") -> list[tuple[str, ...]]:
    hints = typing.get_type_hints(cls, include_extras=True)
    notes = _attribute_docs(cls)
    rows: list[tuple[str, ...]] = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        inner = next((a for a in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(a)), None)
        if isinstance(inner, type):
            rows += _settings(inner, f"{prefix}{field.name}.")
            continue
        default = "required" if field.default is dataclasses.MISSING else f"`{_shown(field.default)}`"
        if field.default_factory is not dataclasses.MISSING:
            default = f"`{_shown(field.default_factory())}`"
        rows.append((f"`{prefix}{field.name}`", _hint(hint).replace("|", "or"), default, notes.get(field.name, "")))
    return rows


def _shown(value: object) -> str:
    return str(value.value) if isinstance(value, enum.Enum) else "none" if value is None else str(value) or '""'


def _settings_table(cls: type) -> Callable[[], str]:
    return lambda: table(("setting", "type", "default", ""), _settings(cls))


PARTS: dict[str, Callable[[], str]] = {
    "settings-device": _settings_table(DeviceConfig),
    "settings-gateway": _settings_table(GatewayConfig),
    "settings-coordinator": _settings_table(CoordinatorConfig),
    "settings-broker": _settings_table(BrokerConfig),
    "settings-helper": _settings_table(HelperConfig),
    "topics": topic_tables,
    "kinds": kind_table,
    "messages": message_tables,
    "reasons": reason_table,
    "metrics": metric_tables,
    "failures": failure_table,
    "device-states": _diagram(DeviceMachine),
    "gateway-states": _diagram(GatewayMachine),
    "coordinator-states": _diagram(CoordinatorMachine),
    "helper-states": _diagram(HelperMachine),
}


def render(text: str) -> str:
    """``text`` with every generated part made anew."""
    return _PART.sub(lambda m: f"{m[1]}{PARTS[m['name']]()}\n{m[3]}", text)


def main() -> int:
    """Write the parts, or with ``--check`` tell which are stale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a part is stale")
    check = parser.parse_args().check
    stale = []
    for path in sorted(DOCS.rglob("*.md")):
        text = path.read_text()
        fresh = render(text)
        if fresh != text:
            stale.append(path.name)
            if not check:
                path.write_text(fresh)
    if stale:
        print(("stale, run `python docs/generate.py`: " if check else "written: ") + ", ".join(stale))
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
