"""The ACL file: parsed as Mosquitto parses it, rendered with least privilege, enforced alike by both brokers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fleetfed.broker.acl import Access, load_acl, parse_acl
from fleetfed.broker.config import BrokerConfig
from fleetfed.broker.render import Inventory, Member, render_acl
from fleetfed.shared.errors import ConfigError
from fleetfed.shared.wire.topics import Kind
from tests.broker.certificates import Authority
from tests.broker.conftest import KINDS, Running, serve

NODES = {"_": "c-main", "north": "g-north", "south": "g-south"}
LISTED = Inventory(
    fleet="demo",
    sites=NODES,
    operators=("o-alice",),
    members={
        "g-north": Member(Kind.GATEWAY, "_"),
        "g-south": Member(Kind.GATEWAY, "_"),
        "d-1": Member(Kind.DEVICE, "north"),
        "d-2": Member(Kind.DEVICE, "north"),
        "d-3": Member(Kind.DEVICE, "south"),
        "h-two": Member(Kind.HELPER, "_"),
    },
)
OPEN = Inventory(fleet="demo", sites=NODES, operators=("o-alice",), members={"h-two": Member(Kind.HELPER, "_")})

# user, topic, may write, may read; True and False hold for both inventories
MATRIX = [
    ("d-1", "ff1/demo/north/d/d-1/up/update", True, False),
    ("d-1", "ff1/demo/north/d/d-1/up/state", True, False),
    ("d-1", "ff1/demo/north/d/d-1/dn/receipt", False, True),
    ("d-1", "ff1/demo/north/d/d-2/up/update", False, False),
    ("d-1", "ff1/demo/north/d/d-2/dn/receipt", False, False),
    ("d-1", "ff1/demo/south/d/d-3/up/update", False, False),
    ("d-1", "ff1/demo/north/b/plan", False, True),
    ("d-1", "ff1/demo/north/b/blob/00112233445566778899aabbccddeeff/0", False, True),
    ("d-1", "ff1/demo/_/g/g-north/up/reveal", False, False),
    ("d-1", "ff1/demo/_/o/o-alice/up/req", False, False),
    ("d-1", "ff1/other/north/d/d-1/up/update", False, False),
    ("d-1", "$SYS/broker/clients/connected", False, False),
    ("g-north", "ff1/demo/north/d/d-1/up/update", False, True),
    ("g-north", "ff1/demo/north/d/d-1/dn/receipt", True, False),
    ("g-north", "ff1/demo/north/g/g-below/up/reveal", False, True),
    ("g-north", "ff1/demo/north/b/plan", True, True),
    ("g-north", "ff1/demo/south/b/plan", False, None),
    ("g-north", "ff1/demo/south/d/d-3/up/update", False, False),
    ("g-north", "ff1/demo/south/d/d-3/dn/receipt", False, False),
    ("g-north", "ff1/demo/_/g/g-north/up/reveal", True, False),
    ("g-north", "ff1/demo/_/g/g-north/dn/receipt", False, True),
    ("g-north", "ff1/demo/_/g/g-south/up/reveal", False, False),
    ("g-north", "ff1/demo/_/b/plan", False, True),
    ("g-north", "$SYS/broker/clients/connected", False, True),
    ("c-main", "ff1/demo/_/g/g-north/up/reveal", False, True),
    ("c-main", "ff1/demo/_/g/g-north/dn/receipt", True, False),
    ("c-main", "ff1/demo/_/b/plan", True, True),
    ("c-main", "ff1/demo/_/o/o-alice/up/req", False, True),
    ("c-main", "ff1/demo/_/o/o-alice/dn/res", True, False),
    ("c-main", "ff1/demo/north/d/d-1/dn/receipt", False, False),
    ("o-alice", "ff1/demo/_/o/o-alice/up/req", True, False),
    ("o-alice", "ff1/demo/_/o/o-alice/dn/res", False, True),
    ("o-alice", "ff1/demo/_/o/o-bob/dn/res", False, False),
    ("o-alice", "ff1/demo/_/b/status", False, True),
    ("o-alice", "ff1/demo/_/b/plan", False, True),
    ("o-alice", "ff1/demo/_/g/g-north/dn/commit", False, False),
    ("d-9", "ff1/demo/_/b/plan", False, None),
    ("c-main", "ff1/demo/_/h/h-two/up/masks", False, True),
    ("c-main", "ff1/demo/_/h/h-two/dn/ask", True, False),
    ("h-two", "ff1/demo/_/h/h-two/up/key", True, False),
    ("h-two", "ff1/demo/_/h/h-two/dn/ask", False, True),
    ("h-two", "ff1/demo/_/b/revoked", False, True),
    ("h-two", "ff1/demo/_/b/plan", False, True),
    ("h-two", "ff1/demo/_/h/h-other/dn/ask", False, False),
    ("h-two", "ff1/demo/_/g/g-north/up/reveal", False, False),
    ("h-two", "ff1/demo/north/d/d-1/up/update", False, False),
    ("d-9", "ff1/demo/_/h/d-9/up/key", False, False),
    ("d-1", "ff1/demo/_/h/h-two/dn/ask", False, False),
]
# What patterns cannot withhold, and exact blocks do.
ONLY_OPEN = [
    ("d-1", "ff1/demo/south/b/plan", False, True),
    ("d-1", "ff1/demo/south/d/d-1/up/update", True, False),
    ("d-9", "ff1/demo/north/d/d-9/up/update", True, False),
]


@pytest.mark.parametrize(("user", "topic", "write", "read"), MATRIX)
@pytest.mark.parametrize("inventory", [LISTED, OPEN], ids=["listed", "open"])
def test_matrix(inventory: Inventory, user: str, topic: str, write: bool | None, read: bool | None) -> None:
    acl = parse_acl(render_acl(inventory))
    for access, expected in ((Access.WRITE, write), (Access.READ, read)):
        if expected is not None:
            assert acl.allows(access, topic, username=user, client_id=user) is expected, access


@pytest.mark.parametrize(("user", "topic", "write", "read"), ONLY_OPEN)
def test_listed_members_have_less_than_patterns_give(user: str, topic: str, write: bool, read: bool) -> None:
    patterns, exact = parse_acl(render_acl(OPEN)), parse_acl(render_acl(LISTED))
    for access, expected in ((Access.WRITE, write), (Access.READ, read)):
        assert patterns.allows(access, topic, username=user, client_id=user) is expected
        assert not exact.allows(access, topic, username=user, client_id=user)


@pytest.fixture(scope="module", params=KINDS)
def guarded(
    request: pytest.FixtureRequest, authority: Authority, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("guarded")
    acl = folder / "acl"
    acl.write_text(render_acl(LISTED))
    config = BrokerConfig(tls=authority.server_files(), acl_file=acl, sys_interval=1)
    with serve(request.param, config, authority, folder) as running:
        yield running


async def test_both_brokers_enforce_the_matrix(guarded: Running) -> None:
    """Live delivery, retained delivery and publishing, as one file grants them.

    A message is published by whoever may write its topic; then every other user subscribes and must see it or not.
    """
    users = sorted({user for user, *_ in MATRIX})
    clients = {user: await guarded.client(user, version=5) for user in users}
    checks = 0
    for user, topic, write, _ in MATRIX:
        if write is None or topic.startswith("$"):
            continue
        code = await clients[user].publish(topic, b"")
        assert (code != 0x87) is write, f"{user} writes {topic}: 0x{code:02x}"
        checks += 1
    writers = {topic: user for user, topic, write, _ in MATRIX if write}
    acl = parse_acl(render_acl(LISTED))
    for index, retain in enumerate((False, True)):
        for client in clients.values():
            assert await client.unsubscribe("#") == (0x11 if not index else 0,)
            if not retain:
                # A subscription is granted whatever it selects; what it may not see is left out at delivery.
                assert await client.subscribe("#") == (1,)
        for topic, writer in writers.items():
            assert await clients[writer].publish(topic, topic.encode(), retain=retain) in {0, 0x10}
        if retain:
            for client in clients.values():
                await client.subscribe("#")
        for user, client in clients.items():
            seen = {message.topic for message in await client.waiting()}
            allowed = {topic for topic in writers if acl.allows(Access.READ, topic, username=user, client_id=user)}
            assert seen == allowed, f"{user}, retained: {retain}"
            checks += len(writers)
    for topic, writer in writers.items():
        await clients[writer].publish(topic, b"", retain=True)
    for client in clients.values():
        await client.disconnect()
    assert checks >= 25


async def test_a_refused_publish_looks_like_success_to_3_1_1_and_goes_nowhere(guarded: Running) -> None:
    watcher = await guarded.client("g-north")
    await watcher.subscribe("ff1/demo/north/d/+/up/+")
    device = await guarded.client("d-1")
    assert await device.publish("ff1/demo/north/d/d-2/up/update", b"forged") == 0
    assert await device.publish("ff1/demo/north/d/d-1/up/update", b"own") == 0
    assert (await watcher.message()).payload == b"own"
    assert await watcher.waiting() == []
    await watcher.disconnect()
    await device.disconnect()


async def test_a_will_obeys_the_acl(guarded: Running) -> None:
    from fleetfed.broker.packets import Will

    watcher = await guarded.client("g-north")
    await watcher.subscribe("ff1/demo/north/d/+/up/state")
    dying = await guarded.client("d-1", will=Will(topic="ff1/demo/north/d/d-2/up/state", payload=b"forged", qos=1))
    dying.abort()
    dying = await guarded.client("d-1", will=Will(topic="ff1/demo/north/d/d-1/up/state", payload=b"lost", qos=1))
    dying.abort()
    assert (await watcher.message()).payload == b"lost"
    assert await watcher.waiting() == []
    await watcher.disconnect()


async def test_a_reload_holds_at_once(guarded: Running) -> None:
    config = guarded.broker._config
    assert config.acl_file is not None
    before = config.acl_file.read_text()
    device = await guarded.client("d-1", version=5)
    topic = "ff1/demo/north/d/d-1/up/update"
    assert await device.publish(topic) != 0x87
    try:
        config.acl_file.write_text(before.replace("topic write ff1/demo/north/d/d-1/up/+\n", ""))
        guarded.reload()
        for _ in range(100):
            if await device.publish(topic) == 0x87:
                break
            await device.ping()
        else:
            pytest.fail("the old rules still hold")
    finally:
        config.acl_file.write_text(before)
        guarded.reload()
    await device.disconnect()


# ---------------------------------------------------------------------------------------------- the format


def allows(text: str, access: Access, topic: str, *, username: str | None = "u", client_id: str = "u") -> bool:
    return parse_acl(text).allows(access, topic, username=username, client_id=client_id)


def test_nothing_is_granted_by_default() -> None:
    assert not allows("", Access.READ, "a")
    assert not allows("user v\ntopic a\n", Access.READ, "a")


def test_lines_before_any_user_are_for_nameless_clients() -> None:
    text = "topic read a\nuser u\ntopic read b\n"
    assert allows(text, Access.READ, "a", username=None)
    assert not allows(text, Access.READ, "a")
    assert allows(text, Access.READ, "b")


def test_a_topic_without_a_word_grants_both() -> None:
    assert allows("user u\ntopic a/b\n", Access.WRITE, "a/b")
    assert allows("user u\ntopic a/b\n", Access.READ, "a/b")


def test_deny_wins_over_any_order_and_over_patterns() -> None:
    text = "user u\ntopic readwrite a/#\ntopic deny a/secret\npattern readwrite a/#\n"
    assert allows(text, Access.READ, "a/x")
    assert not allows(text, Access.READ, "a/secret")
    assert allows(text, Access.READ, "a/secret", username="v", client_id="v")


def test_a_topic_may_contain_spaces() -> None:
    assert allows("user u\ntopic read a b/c\n", Access.READ, "a b/c")


def test_patterns_put_the_names_in() -> None:
    text = "pattern write %u/%c/x\n"
    assert allows(text, Access.WRITE, "u/i/x", client_id="i")
    assert not allows(text, Access.WRITE, "u/u/x", client_id="i")
    assert not allows(text, Access.WRITE, "/i/x", username=None, client_id="i")


def test_a_name_cannot_smuggle_a_wildcard_or_a_placeholder_into_a_pattern() -> None:
    text = "pattern read a/%u\npattern read b/%u/%c\n"
    assert not allows(text, Access.READ, "a/x", username="+", client_id="i")
    assert not allows(text, Access.READ, "a/x", username="x", client_id="#")
    assert not allows(text, Access.READ, "b/i/i", username="%c", client_id="i")


def test_system_topics_are_read_only_and_need_their_own_line() -> None:
    assert not allows("user u\ntopic readwrite #\n", Access.READ, "$SYS/broker/uptime")
    assert allows("user u\ntopic readwrite $SYS/#\n", Access.READ, "$SYS/broker/uptime")
    assert not allows("user u\ntopic readwrite $SYS/#\n", Access.WRITE, "$SYS/broker/uptime")


@pytest.mark.parametrize(
    ("text", "line"),
    [("nonsense a\n", 1), ("user\n", 1), ("user u\ntopic\n", 2), ("\n# c\ntopic wrong a\n", 3), ("pattern\n", 1)],
)
def test_a_wrong_line_is_named(text: str, line: int) -> None:
    with pytest.raises(ConfigError, match=f"acl:{line}:"):
        parse_acl(text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ACL file"):
        load_acl(tmp_path / "none")
