"""An append-only Merkle tree (RFC 6962 section 2.1) over SHA-256: what a log has said, it cannot take back.

A *root* stands for the first ``size`` leaves. An *inclusion* proof shows that a leaf is among them, a *consistency*
proof that a larger tree begins with all that a smaller one held. Both are about log2(size) hashes and need no leaf.

>>> tree = Tree([b"one", b"two", b"three"])
>>> old = tree.root()
>>> _ = tree.append(b"four")
>>> included(b"two", 1, 4, tree.inclusion(1), tree.root())
True
>>> consistent(3, old, 4, tree.root(), tree.consistency(3))
True
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Final

from fleetfed.shared.errors import LocalProtocolError

HASH_SIZE: Final = 32
MAX_PROOF: Final = 64
"""Hashes in a proof about any tree that can exist."""


def leaf_hash(data: bytes) -> bytes:
    """The hash of a leaf; its prefix keeps it from passing for an inner node."""
    return hashlib.sha256(b"\0" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """The hash of an inner node."""
    return hashlib.sha256(b"\1" + left + right).digest()


EMPTY: Final = hashlib.sha256().digest()
"""The root of a tree without leaves."""


class Tree:
    """A tree that grows. It keeps two hashes per leaf, so that roots and proofs of any size cost a few hashes each.

    Args:
        leaves: to begin with.
    """

    def __init__(self, leaves: Iterable[bytes] = ()) -> None:
        # Level k holds the hashes of all complete subtrees of 2^k leaves, from the left.
        self._levels: list[list[bytes]] = [[]]
        for leaf in leaves:
            self.append(leaf)

    def __len__(self) -> int:
        return len(self._levels[0])

    def append(self, leaf: bytes) -> int:
        """Add a leaf; return its index."""
        index = len(self)
        self._levels[0].append(leaf_hash(leaf))
        level = 0
        while len(self._levels[level]) % 2 == 0:
            if level + 1 == len(self._levels):
                self._levels.append([])
            left, right = self._levels[level][-2:]
            self._levels[level + 1].append(node_hash(left, right))
            level += 1
        return index

    def root(self, size: int | None = None) -> bytes:
        """The root over the first ``size`` leaves; over all without.

        Raises:
            LocalProtocolError: there are not so many.
        """
        size = self._size(size)
        return self._hash(0, size) if size else EMPTY

    def inclusion(self, index: int, size: int | None = None) -> tuple[bytes, ...]:
        """The proof that the leaf at ``index`` is among the first ``size``, for `included`.

        Raises:
            LocalProtocolError: it is not.
        """
        size = self._size(size)
        if not 0 <= index < size:
            raise LocalProtocolError(f"leaf {index} is not among {size}")
        proof: list[bytes] = []
        start, end = 0, size
        while end - start > 1:
            middle = start + _split(end - start)
            if index < middle:
                proof.append(self._hash(middle, end))
                end = middle
            else:
                proof.append(self._hash(start, middle))
                start = middle
        return tuple(reversed(proof))

    def consistency(self, old: int, size: int | None = None) -> tuple[bytes, ...]:
        """The proof that the tree of ``size`` leaves begins with that of ``old`` leaves, for `consistent`.

        Raises:
            LocalProtocolError: ``old`` is 0 or larger than ``size``.
        """
        size = self._size(size)
        if not 0 < old <= size:
            raise LocalProtocolError(f"no tree of {size} leaves can be said to begin with one of {old}")
        proof: list[bytes] = []
        start, end = 0, size
        whole = True  # the old tree is a complete subtree here, whose hash the verifier has: it is the old root
        while old != end:
            middle = start + _split(end - start)
            if old <= middle:
                proof.append(self._hash(middle, end))
                end = middle
            else:
                proof.append(self._hash(start, middle))
                start = middle
                whole = False
        if not whole:
            proof.append(self._hash(start, end))
        return tuple(reversed(proof))

    def _size(self, size: int | None) -> int:
        if size is None:
            return len(self)
        if not 0 <= size <= len(self):
            raise LocalProtocolError(f"the tree has {len(self)} leaves, not {size}")
        return size

    def _hash(self, start: int, end: int) -> bytes:
        """The root over the leaves from ``start`` to before ``end``; ``start`` is where a subtree may begin."""
        count = end - start
        if count & (count - 1) == 0:
            level = count.bit_length() - 1
            return self._levels[level][start >> level]
        middle = start + _split(count)
        return node_hash(self._hash(start, middle), self._hash(middle, end))


def _split(count: int) -> int:
    """The largest power of two below ``count``: how many leaves go to the left."""
    return 1 << ((count - 1).bit_length() - 1)


def included(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> bool:
    """Whether ``proof`` shows that ``leaf`` stands at ``index`` in the tree of ``size`` leaves with this ``root``.

    RFC 9162 section 2.1.3.2 tells the algorithm; nothing about the arguments is believed.
    """
    if not 0 <= index < size or len(proof) > MAX_PROOF:
        return False
    position, last = index, size - 1
    value = leaf_hash(leaf)
    for each in proof:
        if last == 0:
            return False
        if position & 1 or position == last:
            value = node_hash(each, value)
            while not position & 1 and position:
                position >>= 1
                last >>= 1
        else:
            value = node_hash(value, each)
        position >>= 1
        last >>= 1
    return last == 0 and value == root


def consistent(old: int, old_root: bytes, size: int, root: bytes, proof: Sequence[bytes]) -> bool:
    """Whether ``proof`` shows that the tree of ``size`` leaves begins with the one of ``old`` leaves.

    RFC 9162 section 2.1.4.2 tells the algorithm; nothing about the arguments is believed.
    """
    if not 0 < old <= size or len(proof) > MAX_PROOF:
        return False
    if old == size:
        return not proof and old_root == root
    path = list(proof)
    if old & (old - 1) == 0:
        path.insert(0, old_root)
    if not path:
        return False
    position, last = old - 1, size - 1
    while position & 1:
        position >>= 1
        last >>= 1
    first = second = path[0]
    for each in path[1:]:
        if last == 0:
            return False
        if position & 1 or position == last:
            first = node_hash(each, first)
            second = node_hash(each, second)
            while not position & 1 and position:
                position >>= 1
                last >>= 1
        else:
            second = node_hash(second, each)
        position >>= 1
        last >>= 1
    return last == 0 and first == old_root and second == root
