"""Topic filters: their rules, the tree of subscriptions and the tree of retained messages. Pure.

>>> topic_matches("a/+/c", "a/b/c"), topic_matches("#", "$SYS/broker"), topic_matches("a/#", "a")
(True, False, True)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Generic, TypeVar

MAX_LEVELS: Final = 32
"""Levels of a topic or filter: the trees are walked recursively."""
MAX_TOPIC: Final = 1024
"""Characters of a topic or filter."""
_SHARE: Final = "$share/"

S = TypeVar("S")
O = TypeVar("O")  # noqa: E741


def is_valid_filter(text: str) -> bool:
    """Whether wildcards stand alone in their level, ``#`` last (MQTT 5 §4.7.1), within the broker's bounds."""
    if not text or len(text) > MAX_TOPIC:
        return False
    levels = text.split("/")
    if len(levels) > MAX_LEVELS:
        return False
    last = len(levels) - 1
    for index, level in enumerate(levels):
        if "#" in level and (level != "#" or index != last):
            return False
        if "+" in level and level != "+":
            return False
    return True


def is_valid_topic(text: str) -> bool:
    """Whether a topic name is within the broker's bounds (wildcards are refused when it is decoded)."""
    return 0 < len(text) <= MAX_TOPIC and text.count("/") < MAX_LEVELS


def split_shared(text: str) -> tuple[str | None, str] | None:
    """Split ``$share/{group}/{filter}`` (MQTT 5 §4.8.2).

    Returns:
        ``(group, filter)``, the group ``None`` for an ordinary filter; ``None`` if the text is not a valid one.
    """
    if not text.startswith(_SHARE):
        return (None, text) if is_valid_filter(text) else None
    group, slash, rest = text[len(_SHARE) :].partition("/")
    if not group or not slash or "+" in group or "#" in group or not is_valid_filter(rest):
        return None
    return group, rest


def topic_matches(topic_filter: str, topic: str) -> bool:
    """Whether ``topic_filter`` selects ``topic``; a leading wildcard never selects a topic that starts with ``$``."""
    if topic_filter == topic:
        return True
    if topic[:1] == "$" and topic_filter[:1] != "$":
        return False
    if "+" not in topic_filter and topic_filter[-1:] != "#":
        return False
    wanted, levels = topic_filter.split("/"), topic.split("/")
    for index, level in enumerate(wanted):
        if level == "#":
            return True
        if index >= len(levels) or (level != "+" and level != levels[index]):
            return False
    return len(wanted) == len(levels)


_Levels = dict[str, "_Levels"]


class _Node(Generic[S, O]):
    __slots__ = ("children", "shared", "subscribers")

    def __init__(self) -> None:
        self.children: dict[str, _Node[S, O]] = {}
        self.subscribers: dict[S, O] = {}
        self.shared: dict[str, dict[S, O]] = {}

    def is_empty(self) -> bool:
        return not (self.children or self.subscribers or self.shared)


class SubscriptionTree(Generic[S, O]):
    """Which subscriber asked for which filter, with which options."""

    __slots__ = ("_root",)

    def __init__(self) -> None:
        self._root: _Node[S, O] = _Node()

    def add(self, topic_filter: str, subscriber: S, options: O, group: str | None = None) -> None:
        """Add or replace a subscription."""
        node = self._root
        for level in topic_filter.split("/"):
            child = node.children.get(level)
            if child is None:
                child = node.children[level] = _Node()
            node = child
        if group is None:
            node.subscribers[subscriber] = options
        else:
            node.shared.setdefault(group, {})[subscriber] = options

    def remove(self, topic_filter: str, subscriber: S, group: str | None = None) -> None:
        """Remove a subscription, and the branch that it leaves empty."""
        path: list[tuple[_Node[S, O], str]] = []
        node = self._root
        for level in topic_filter.split("/"):
            child = node.children.get(level)
            if child is None:
                return
            path.append((node, level))
            node = child
        if group is None:
            node.subscribers.pop(subscriber, None)
        elif (members := node.shared.get(group)) is not None:
            members.pop(subscriber, None)
            if not members:
                del node.shared[group]
        for parent, level in reversed(path):
            if not parent.children[level].is_empty():
                break
            del parent.children[level]

    def match(self, topic: str) -> tuple[list[dict[S, O]], list[dict[S, O]]]:
        """Find who gets ``topic``.

        Returns:
            the subscribers of every matching filter, and the members of every matching shared group, of which one
            is to be chosen. The dictionaries are the tree's own: read them, do not keep or change them.
        """
        plain: list[dict[S, O]] = []
        groups: list[dict[S, O]] = []
        levels = topic.split("/")
        self._collect(self._root, levels, 0, plain, groups, topic[:1] == "$")
        return plain, groups

    def _collect(
        self,
        node: _Node[S, O],
        levels: list[str],
        index: int,
        plain: list[dict[S, O]],
        groups: list[dict[S, O]],
        exact_first: bool,
    ) -> None:
        children = node.children
        if not exact_first and (rest := children.get("#")) is not None:
            _take(rest, plain, groups)
        if index == len(levels):
            _take(node, plain, groups)
            return
        if (child := children.get(levels[index])) is not None:
            self._collect(child, levels, index + 1, plain, groups, False)
        if not exact_first and (child := children.get("+")) is not None:
            self._collect(child, levels, index + 1, plain, groups, False)


def _take(node: _Node[S, O], plain: list[dict[S, O]], groups: list[dict[S, O]]) -> None:
    if node.subscribers:
        plain.append(node.subscribers)
    groups.extend(node.shared.values())


class RetainedTree(Generic[S]):
    """The last retained value of every topic, found by exact name or by filter."""

    __slots__ = ("_root", "_values")

    def __init__(self) -> None:
        self._values: dict[str, S] = {}
        self._root: _Levels = {}

    def __len__(self) -> int:
        return len(self._values)

    def get(self, topic: str) -> S | None:
        """The value of exactly ``topic``."""
        return self._values.get(topic)

    def items(self) -> Iterator[tuple[str, S]]:
        """All topics and values."""
        return iter(self._values.items())

    def set(self, topic: str, value: S) -> None:
        """Set the value of ``topic``."""
        if topic not in self._values:
            node = self._root
            for level in topic.split("/"):
                node = node.setdefault(level, {})
        self._values[topic] = value

    def remove(self, topic: str) -> S | None:
        """Remove ``topic`` and return the value that it had."""
        value = self._values.pop(topic, None)
        if value is None:
            return None
        path = []
        node = self._root
        for level in topic.split("/"):
            path.append((node, level))
            node = node[level]
        # A node may stay although it is a prefix of nothing but a stored shorter topic: keep those.
        prefix = topic
        for parent, level in reversed(path):
            if parent[level] or prefix in self._values:
                break
            del parent[level]
            prefix = prefix.rpartition("/")[0]
        return value

    def match(self, topic_filter: str) -> Iterator[tuple[str, S]]:
        """All topics that ``topic_filter`` selects, in the order of their levels."""
        if "+" not in topic_filter and "#" not in topic_filter:
            value = self._values.get(topic_filter)
            if value is not None:
                yield topic_filter, value
            return
        for topic in list(self._walk(self._root, topic_filter.split("/"), 0, "")):
            value = self._values.get(topic)
            if value is not None:
                yield topic, value

    def _walk(self, node: _Levels, wanted: list[str], index: int, prefix: str) -> Iterator[str]:
        if index == len(wanted):
            yield prefix
            return
        level = wanted[index]
        if level == "#" and index:
            yield from self._below(node, prefix)
        elif level in {"+", "#"}:
            for name, child in node.items():
                # MQTT 5 §4.7.2: a leading wildcard does not select topics that start with "$".
                if index == 0 and name[:1] == "$":
                    continue
                path = f"{prefix}/{name}" if index else name
                if level == "#":
                    yield from self._below(child, path)
                else:
                    yield from self._walk(child, wanted, index + 1, path)
        elif (child := node.get(level)) is not None:  # type: ignore[assignment]
            yield from self._walk(child, wanted, index + 1, f"{prefix}/{level}" if index else level)

    def _below(self, node: _Levels, prefix: str) -> Iterator[str]:
        yield prefix
        for name, child in node.items():
            yield from self._below(child, f"{prefix}/{name}")
