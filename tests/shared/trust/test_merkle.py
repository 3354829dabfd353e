"""The tree of RFC 6962: known values, the definition as a second implementation, and proofs that cannot be bent."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetfed.shared.errors import LocalProtocolError
from fleetfed.shared.trust.merkle import EMPTY, Tree, consistent, included, leaf_hash, node_hash

# The inputs and roots that the Certificate Transparency project tests its implementations with.
INPUTS = [
    bytes.fromhex(text)
    for text in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


def defined(leaves: Sequence[bytes]) -> bytes:
    """RFC 6962 section 2.1, word by word."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\0" + leaves[0]).digest()
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    return hashlib.sha256(b"\1" + defined(leaves[:k]) + defined(leaves[k:])).digest()


def proven(index: int, leaves: Sequence[bytes]) -> list[bytes]:
    """RFC 6962 section 2.1.1, word by word."""
    if len(leaves) == 1:
        return []
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    if index < k:
        return [*proven(index, leaves[:k]), defined(leaves[k:])]
    return [*proven(index - k, leaves[k:]), defined(leaves[:k])]


def grown(old: int, leaves: Sequence[bytes], *, whole: bool = True) -> list[bytes]:
    """RFC 6962 section 2.1.2, word by word."""
    if old == len(leaves):
        return [] if whole else [defined(leaves)]
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    if old <= k:
        return [*grown(old, leaves[:k], whole=whole), defined(leaves[k:])]
    return [*grown(old - k, leaves[k:], whole=False), defined(leaves[:k])]


def test_the_known_roots() -> None:
    assert Tree().root() == EMPTY == bytes.fromhex("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
    tree = Tree()
    for data, root in zip(INPUTS, ROOTS, strict=True):
        tree.append(data)
        assert tree.root().hex() == root
    assert [tree.root(size).hex() for size in range(1, 9)] == ROOTS


def test_the_known_proofs() -> None:
    tree = Tree(INPUTS)
    assert [each.hex() for each in tree.inclusion(0, 8)] == [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ]
    assert [each.hex() for each in tree.consistency(6, 8)] == [
        "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ]
    assert tree.consistency(8) == ()


def test_every_small_tree_is_as_defined_and_every_proof_holds() -> None:
    leaves = [bytes([n]) for n in range(40)]
    tree = Tree(leaves)
    for size in range(1, 41):
        root = tree.root(size)
        assert root == defined(leaves[:size])
        for index in range(size):
            proof = tree.inclusion(index, size)
            assert list(proof) == proven(index, leaves[:size])
            assert included(leaves[index], index, size, proof, root)
        for old in range(1, size + 1):
            proof = tree.consistency(old, size)
            assert list(proof) == grown(old, leaves[:size])
            assert consistent(old, tree.root(old), size, root, proof)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), size=st.integers(1, 200))
def test_a_bent_proof_of_inclusion_is_refused(data: st.DataObject, size: int) -> None:
    leaves = [n.to_bytes(2, "little") for n in range(size)]
    tree = Tree(leaves)
    index = data.draw(st.integers(0, size - 1))
    proof, root = tree.inclusion(index), tree.root()
    assert included(leaves[index], index, size, proof, root)
    assert not included(leaves[index] + b"x", index, size, proof, root)
    assert not included(leaves[index], index, size, (*proof, bytes(32)), root)
    assert not included(leaves[index], index, size, proof, bytes(32))
    other = data.draw(st.integers(-2, size + 2).filter(lambda each: each != index))
    assert not included(leaves[index], other, size, proof, root)
    if proof:
        at = data.draw(st.integers(0, len(proof) - 1))
        bent = (*proof[:at], leaf_hash(proof[at]), *proof[at + 1 :])
        assert not included(leaves[index], index, size, bent, root)
        assert not included(leaves[index], index, size, proof[:-1], root)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), size=st.integers(2, 200))
def test_a_log_that_changed_its_past_has_no_proof(data: st.DataObject, size: int) -> None:
    leaves = [n.to_bytes(2, "little") for n in range(size)]
    old = data.draw(st.integers(1, size - 1))
    honest = Tree(leaves)
    changed = data.draw(st.integers(0, old - 1))
    forged = Tree([*leaves[:changed], b"forged", *leaves[changed + 1 :]])
    assert consistent(old, honest.root(old), size, honest.root(), honest.consistency(old))
    assert not consistent(old, honest.root(old), size, forged.root(), forged.consistency(old))
    assert not consistent(old, honest.root(old), size, forged.root(), honest.consistency(old))
    assert not consistent(old, forged.root(old), size, honest.root(), honest.consistency(old))
    assert not consistent(old, honest.root(old), size, honest.root(), honest.consistency(old)[:-1])
    assert not consistent(0, EMPTY, size, honest.root(), ())


def test_an_inner_node_does_not_pass_for_a_leaf() -> None:
    tree = Tree([b"a", b"b"])
    inner = leaf_hash(b"a") + leaf_hash(b"b")
    assert node_hash(leaf_hash(b"a"), leaf_hash(b"b")) == tree.root()
    assert not included(inner, 0, 1, (), tree.root())


def test_what_cannot_be_asked_for() -> None:
    tree = Tree([b"a", b"b"])
    for ask in (lambda: tree.root(3), lambda: tree.inclusion(2), lambda: tree.consistency(0), lambda: tree.root(-1)):
        with pytest.raises(LocalProtocolError):
            ask()
