"""What RabbitMQ and NATS are told grants exactly what Mosquitto's access list grants."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from fleetfed.broker.acl import Access, parse_acl
from fleetfed.broker.engines import Engine, render_rights
from fleetfed.broker.nats import render_users
from fleetfed.broker.rabbitmq import render_definitions
from fleetfed.broker.render import Inventory, Member, render_acl
from fleetfed.broker.topictree import topic_matches
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.wire.topics import Kind

FLEET = Inventory(
    fleet="demo",
    sites={"_": "c-main", "north": "g-north"},
    operators=("o-alice",),
    members={
        "g-north": Member(Kind.GATEWAY, "_"),
        "d-1": Member(Kind.DEVICE, "north"),
        "d-2": Member(Kind.DEVICE, "north"),
        "h-1": Member(Kind.HELPER, "_"),
    },
)
NAMES = ["c-main", "g-north", "o-alice", "d-1", "d-2", "h-1"]
BRANCHES = [("d", "d-1"), ("d", "d-2"), ("d", "d-12"), ("g", "g-north"), ("o", "o-alice"), ("h", "h-1")]
TOPICS = [
    *(
        f"ff1/{fleet}/{site}/{kind}/{name}/{direction}/{verb}"
        for fleet, site, (kind, name), direction, verb in itertools.product(
            ("demo", "demo2"), ("_", "north", "south"), BRANCHES, ("up", "dn"), ("state", "link", "update/more")
        )
    ),
    *(f"ff1/demo/{site}/b/{what}" for site in ("_", "north", "south") for what in ("plan", "blob/00ff/0")),
    "ff1/demo/north",
    "other",
    "ff1/demo/north/d/d-1",
]


def definitions() -> dict[str, Any]:
    """What RabbitMQ knows in the end."""
    tables: dict[str, Any] = {}
    for text in render_definitions(FLEET).values():
        tables |= json.loads(text)
    return tables


def granted(name: str, access: Access) -> set[str]:
    acl = parse_acl(render_acl(FLEET))
    return {topic for topic in TOPICS if acl.allows(access, topic, username=name, client_id=name)}


@pytest.mark.parametrize("name", NAMES)
def test_rabbitmq_grants_what_the_list_grants(name: str) -> None:
    tables = definitions()
    (rights,) = [row for row in tables["topic_permissions"] if row["user"] == name]
    for access, key in ((Access.READ, "read"), (Access.WRITE, "write")):
        rule = re.compile(rights[key])
        assert {topic for topic in TOPICS if rule.search(topic.replace("/", "."))} == granted(name, access)


@pytest.mark.parametrize("name", NAMES)
def test_nats_grants_what_the_list_grants(name: str) -> None:
    users = nats_users()
    for access, key in ((Access.READ, "subscribe"), (Access.WRITE, "publish")):
        filters = [each.replace(".", "/").replace("*", "+").replace(">", "#") for each in users[name][key]]
        # `a.>` is not `a`, which `a/#` is: both are listed.
        assert {topic for topic in TOPICS if any(topic_matches(each, topic) for each in filters)} == granted(
            name, access
        )


def nats_users() -> dict[str, Any]:
    """The file's users by common name; it is JSON but for the equals signs, the missing commas and the comment."""
    text = render_users(FLEET)
    found = re.findall(
        r'user = "CN=([^,]+),OU=[a-z]+,O=demo".*?publish = (\[.*?\]),\s+subscribe = (\[.*?\])', text, re.S
    )
    return {name: {"publish": json.loads(write), "subscribe": json.loads(read)} for name, write, read in found}


def test_nats_knows_everybody_by_the_subject_of_the_certificate() -> None:
    text = render_users(FLEET)
    for subject in ("CN=c-main,OU=coordinator", "CN=g-north,OU=gateway", "CN=d-1,OU=device", "CN=o-alice,OU=operator"):
        assert f'"{subject},O=demo"' in text


def test_rabbitmq_lets_nobody_have_the_session_of_another() -> None:
    tables = definitions()
    rules = {row["user"]: row for row in tables["permissions"]}
    for name, other in itertools.product(("d-1", "g-north"), ("d-1", "d-2", "d-12", "g-north", "xd-1")):
        for right in ("configure", "read", "write"):
            assert bool(re.search(rules[name][right], f"mqtt-subscription-{other}qos1")) == (name == other)
    assert not re.search(rules["d-1"]["read"], "amqXtopic")
    assert not re.search(rules["d-1"]["configure"], "amq.topic")
    assert all(not row["password_hash"] for row in tables["users"]), "nobody logs in with a password"


def test_rabbitmq_lets_nobody_in_before_it_knows_their_topics() -> None:
    """It takes in files by name, permissions before topics, and grants every topic where it was told of none."""
    first, second = (json.loads(text) for _, text in sorted(render_definitions(FLEET).items()))
    assert {row["user"] for row in first["topic_permissions"]} == {row["name"] for row in first["users"]} == {*NAMES}
    assert "permissions" not in first
    assert {row["user"] for row in second["permissions"]} == {*NAMES}


def test_a_wildcard_of_rabbitmq_in_the_middle_widens_nothing() -> None:
    """A level of a subscription is checked as it is written, and `#` stands for any number of levels."""
    tables = definitions()
    (rights,) = [row for row in tables["topic_permissions"] if row["user"] == "g-north"]
    assert re.search(rights["read"], "ff1.demo.north.d.*.up.state")
    for sly in ("ff1.demo.north.d.#.up.state", "ff1.demo.north.d.#", "#", "ff1.demo.*.d.*.up.state"):
        assert not re.search(rights["read"], sly), sly


@pytest.mark.parametrize("engine", [Engine.RABBITMQ, Engine.NATS])
def test_who_is_not_listed_is_not_known(engine: Engine, tmp_path: Path) -> None:
    without_devices = Inventory(fleet="demo", sites={"north": "g-north"})
    assert not any("d-1" in path.read_text() for path in render_rights(engine, without_devices, tmp_path))
    denied = Inventory(fleet="demo", sites=FLEET.sites, members=FLEET.members, denied=("d-9",))
    with pytest.raises(ConfigError, match="no user at all"):
        render_rights(engine, denied, tmp_path)


def test_the_file_may_be_read_by_the_broker(tmp_path: Path) -> None:
    for engine, names in (
        (Engine.NATS, ["users.conf"]),
        (Engine.RABBITMQ, ["definitions/1-topics.json", "definitions/2-access.json"]),
    ):
        files = render_rights(engine, FLEET, tmp_path)
        assert [str(path.relative_to(tmp_path)) for path in files] == names
        assert all(path.stat().st_mode & 0o777 == 0o644 for path in files)
