from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetfed.broker.topictree import (
    RetainedTree,
    SubscriptionTree,
    is_valid_filter,
    is_valid_topic,
    split_shared,
    topic_matches,
)

level = st.sampled_from(["", "a", "b", "$SYS", "c"])
topics = st.lists(level, min_size=1, max_size=4).map("/".join).filter(bool)
filters = (
    st.tuples(st.lists(st.one_of(level, st.just("+")), max_size=4), st.sampled_from([[], ["#"]]))
    .map(lambda pair: "/".join(pair[0] + pair[1]))
    .filter(bool)
)


@pytest.mark.parametrize(
    ("topic_filter", "topic", "expected"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a/c", False),
        ("a/+", "a/b", True),
        ("a/+", "a/b/c", False),
        ("a/+", "a", False),
        ("a/+", "a/", True),
        ("a/#", "a", True),
        ("a/#", "a/b/c", True),
        ("#", "a", True),
        ("#", "$SYS/x", False),
        ("+/x", "$SYS/x", False),
        ("$SYS/#", "$SYS/x", True),
        ("+/+", "/a", True),
        ("/+", "/a", True),
        ("+", "/a", False),
    ],
)
def test_the_examples_of_the_specification(topic_filter: str, topic: str, expected: bool) -> None:
    assert topic_matches(topic_filter, topic) is expected


@given(st.lists(st.tuples(filters, st.integers(0, 3)), max_size=12), topics)
def test_the_tree_finds_whom_the_definition_selects(entries: list[tuple[str, int]], topic: str) -> None:
    tree: SubscriptionTree[int, str] = SubscriptionTree()
    for topic_filter, subscriber in entries:
        tree.add(topic_filter, subscriber, topic_filter)
    plain, _ = tree.match(topic)
    found = {(text, who) for group in plain for who, text in group.items()}
    assert found == {entry for entry in entries if topic_matches(entry[0], topic)}
    for topic_filter, subscriber in entries:
        tree.remove(topic_filter, subscriber)
    assert tree._root.is_empty(), "nothing is left behind"


@given(st.lists(topics, max_size=12), filters, st.data())
def test_the_retained_tree_finds_what_the_definition_selects(
    kept: list[str], topic_filter: str, data: st.DataObject
) -> None:
    tree: RetainedTree[int] = RetainedTree()
    for index, topic in enumerate(kept):
        tree.set(topic, index)
    removed = data.draw(st.lists(topics, max_size=4))
    for topic in removed:
        tree.remove(topic)
    left = {topic: index for index, topic in enumerate(kept) if topic not in removed}
    found = list(tree.match(topic_filter))
    assert dict(found) == {topic: index for topic, index in left.items() if topic_matches(topic_filter, topic)}
    assert len(found) == len(dict(found)), "each once"
    for topic in list(left):
        tree.remove(topic)
    assert tree._root == {}
    assert len(tree) == 0


def test_shared_groups_are_apart() -> None:
    tree: SubscriptionTree[str, int] = SubscriptionTree()
    tree.add("a/+", "x", 1, "g")
    tree.add("a/+", "y", 1, "g")
    tree.add("a/b", "z", 1, "h")
    plain, groups = tree.match("a/b")
    assert plain == []
    assert sorted(map(sorted, groups)) == [["x", "y"], ["z"]]
    tree.remove("a/+", "x", "g")
    tree.remove("a/+", "y", "g")
    tree.remove("a/b", "z", "h")
    assert tree._root.is_empty()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/b", (None, "a/b")),
        ("$share/g/a/#", ("g", "a/#")),
        ("$share/g//a", ("g", "/a")),
        ("$share/g", None),
        ("$share//a", None),
        ("$share/+/a", None),
        ("$share/g/", None),
        ("a/#/b", None),
        ("a+", None),
        ("", None),
        ("/".join("a" * 33), None),
        ("a" * 1025, None),
    ],
)
def test_filters_are_checked(text: str, expected: tuple[str | None, str] | None) -> None:
    assert split_shared(text) == expected


def test_topics_have_bounds() -> None:
    assert is_valid_topic("a/b")
    assert not is_valid_topic("")
    assert not is_valid_topic("/".join("a" * 33))
    assert not is_valid_topic("a" * 1025)
    assert is_valid_filter("+/#")
