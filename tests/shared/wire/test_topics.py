from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetfed.shared.errors import LocalProtocolError, RejectReason, RemoteProtocolError
from fleetfed.shared.wire.topics import (
    VERBS,
    BlobTopic,
    Broadcast,
    BroadcastTopic,
    Direction,
    Kind,
    MemberTopic,
    SiteTopics,
    Verb,
    parse,
)

ids = st.from_regex(r"[a-z0-9_-]{1,48}", fullmatch=True)
uses = [(verb, kind) for verb, rule in VERBS.items() for kind in rule.kinds]


@given(fleet=ids, site=ids, member=ids, use=st.sampled_from(uses))
def test_a_member_topic_parses_to_what_built_it(fleet: str, site: str, member: str, use: tuple[Verb, Kind]) -> None:
    verb, kind = use
    topics = SiteTopics(fleet, site)
    build = topics.up if VERBS[verb].direction is Direction.UP else topics.down
    topic = build(kind, member, verb)
    assert parse(topic) == MemberTopic(fleet, site, kind, member, VERBS[verb].direction, verb)
    assert topic.count("/") <= 7
    assert len(topic) <= 200


@given(fleet=ids, site=ids, digest=st.binary(min_size=16, max_size=32), index=st.integers(0, 8191))
def test_a_blob_topic_parses_to_what_built_it(fleet: str, site: str, digest: bytes, index: int) -> None:
    assert parse(SiteTopics(fleet, site).blob(digest, index)) == BlobTopic(fleet, site, digest[:16], index)


@pytest.mark.parametrize("what", Broadcast)
def test_a_broadcast_topic_parses_to_what_built_it(what: Broadcast) -> None:
    assert parse(SiteTopics("f", "s").broadcast(what)) == BroadcastTopic("f", "s", what)


@given(st.text(max_size=80))
def test_any_other_topic_is_malformed(topic: str) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        parse(topic)
    assert caught.value.reason is RejectReason.MALFORMED


@pytest.mark.parametrize(
    "topic",
    [
        "ff1/f/s/d/x/dn/update",  # an update goes up
        "ff1/f/s/g/x/up/update",  # and is a device's
        "ff1/f/s/d/X/up/update",
        "ff1/f/s/d/x.y/up/update",
        "ff1/f/s/d//up/update",
        "ff1/f/s/d/x/up/update/",
        "ff1/f/s/b/blob/" + "0a" * 16 + "/01",
        "ff1/f/s/b/blob/" + "0A" * 16 + "/1",
        "ff1/f/s/b/secret",
        "ff2/f/s/b/plan",
    ],
)
def test_a_near_miss_is_malformed(topic: str) -> None:
    with pytest.raises(RemoteProtocolError):
        parse(topic)


@pytest.mark.parametrize("bad", ["", "a" * 49, "Ä", "a/b", "a+b", "#", "a.b", "A", "a b", "a\n"])
def test_an_id_that_could_escape_its_topic_is_refused(bad: str) -> None:
    with pytest.raises(LocalProtocolError):
        SiteTopics("f", bad)
    with pytest.raises(LocalProtocolError):
        SiteTopics("f", "s").up(Kind.DEVICE, bad, Verb.UPDATE)


def test_a_verb_in_the_wrong_direction_or_kind_is_our_own_fault() -> None:
    topics = SiteTopics("f", "s")
    with pytest.raises(LocalProtocolError):
        topics.down(Kind.DEVICE, "x", Verb.UPDATE)
    with pytest.raises(LocalProtocolError):
        topics.up(Kind.OPERATOR, "x", Verb.UPDATE)
