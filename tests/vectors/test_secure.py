"""The vectors in `secure.json`: what the shipped code makes and opens, a second implementation makes and opens too."""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fleetfed.shared.aggregate.lanes import LaneLayout
from fleetfed.shared.secure import split
from fleetfed.shared.secure.box import Reader, SealSecret
from fleetfed.shared.secure.buckets import commit_nonce, deal
from fleetfed.shared.wire.envelope import MessageId, digest, parse_head

HERE = Path(__file__).parent


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"vectors_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


make_secure, second, second_decoder, second_numbers = (
    _load(name) for name in ("make_secure", "second_secure", "second_decoder", "second_numbers")
)
STORED: dict[str, Any] = json.loads((HERE / "secure.json").read_text())
SECRETS = {tag: bytes.fromhex(secret) for tag, secret in STORED["secrets"].items()}
PARTS = {"randomness": bytes.fromhex(STORED["randomness"]), "hedge": bytes.fromhex(STORED["hedge"])}


@pytest.fixture(params=STORED["rounds"])
def rnd(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = STORED["rounds"][request.param]
    return found


def updates(rnd: dict[str, Any]) -> list[bytes]:
    return [bytes.fromhex(update) for update in rnd["updates"]]


def held(rnd: dict[str, Any]) -> dict[str, bytes]:
    """The secrets of those whom the round's updates have boxes for."""
    return dict(list(SECRETS.items())[: 1 + rnd["holders"]])


def test_the_second_implementation_unmasks_the_sum(rnd: dict[str, Any]) -> None:
    masked, masks = [], []
    for raw in updates(rnd):
        assert second_decoder.message(raw, bytes.fromhex(STORED["authority"]))["kind"] == "update"
        seen = second.update(raw, held(rnd), **PARTS)
        masked.append(seen["masked"])
        masks += seen["masks"].values()
    total = second.subtract(second.add(*masked), *masks)
    dimension, meta = len(rnd["values"][0]), len(rnd["meta"][0])
    found = second_numbers.lanes(struct.pack(f"<{len(total)}Q", *total), dimension, rnd["lane_bits"], meta)
    sums = [[sum(column) for column in zip(*rows, strict=True)] for rows in (rnd["values"], rnd["meta"])]
    assert list(found) == sums


def test_both_see_the_same_in_every_update(rnd: dict[str, Any]) -> None:
    layout = LaneLayout(len(rnd["values"][0]), rnd["lane_bits"], len(rnd["meta"][0]))
    secrets = {Reader(tag.encode()): SealSecret.from_bytes(secret, rnd["suite"]) for tag, secret in held(rnd).items()}
    for raw in updates(rnd):
        head, seen = parse_head(raw), second.update(raw, held(rnd), **PARTS)
        assert split.binding_of(head) == seen["binding"]
        body = memoryview(raw)[head.size :]
        opened = split.open_words(head, body, secret=secrets[Reader.GATEWAY], n_words=layout.n_words)
        assert opened.tolist() == seen["masked"]
        for reader in list(secrets)[1:]:
            tag = reader.value.decode()
            seed = split.open_seed(head, reader, secrets[reader])
            assert seed == seen["keys"][tag]
            mask = layout.zeros()
            split.add_masks(mask, [split.mask_key(seed, split.binding_of(head))])
            assert mask.tolist() == seen["masks"][tag]


def test_our_device_still_makes_these_bodies() -> None:
    """The boxes around the keys differ with every run; bodies and what is signed beside them do not."""
    for name, made in make_secure.make()["rounds"].items():
        for new, old in zip(updates(made), updates(STORED["rounds"][name]), strict=True):
            head, before = parse_head(new), parse_head(old)
            assert split.binding_of(head) == split.binding_of(before)
            assert new[head.size :] == old[before.size :]


def test_buckets() -> None:
    for case in STORED["dealt"]:
        buckets = [[bytes.fromhex(member) for member in bucket] for bucket in case["buckets"]]
        owners = {bytes.fromhex(member): owner for member, owner in case["owners"].items()}
        assert second.deal(owners, case["size"], case["minimum_owners"], b"g" * 16, b"c" * 16) == buckets
        ours = deal(
            {MessageId(member): owner for member, owner in owners.items()},
            case["size"],
            minimum_owners=case["minimum_owners"],
            gateway_nonce=b"g" * 16,
            coordinator_nonce=b"c" * 16,
        )
        assert [list(bucket) for bucket in ours] == buckets
    nonce, hashed = (bytes.fromhex(STORED["nonce"][name]) for name in ("nonce", "hash"))
    assert commit_nonce(nonce) == hashed == second.blake(b"ff-nonce" + nonce) == digest(b"ff-nonce" + nonce)


def test_the_second_implementation_knows_rfc_8439() -> None:
    """Its own pieces against the RFC's vectors (2.3.2, 2.5.2, 2.8.2), so that two equal mistakes are no agreement."""
    key = bytes(range(32))
    block = second.chacha20_block(key, 1, bytes.fromhex("000000090000004a00000000"))
    assert block.hex().startswith("10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e")
    one_time = bytes.fromhex("85d6be7857556d337f4452fe42d506a80103808afb0db2fd4abff6af4149f51b")
    tag = second.poly1305(one_time, b"Cryptographic Forum Research Group")
    assert tag.hex() == "a8061dc1305136c6c22b8baf0c0127a9"


def test_the_second_implementation_refuses_what_was_changed(rnd: dict[str, Any]) -> None:
    size = {1: 113, 3: 1168}[rnd["suite"]]
    for at in (-1, 208 + 40, 208 + size - 1):
        raw = bytearray(updates(rnd)[0])
        raw[at] ^= 1
        with pytest.raises(ValueError, match="wrong tag"):
            second.update(bytes(raw), held(rnd), **PARTS)
