"""What brokers heard, and what must never have been said.

A failure is:

- two different plans, ends, cosignatures, proposals, commits, reveals, sums of masks or updates where the protocol
  knows one: whoever restarts says the same bytes again, or nothing;
- a reason that only a liar, or a bug, gives occasion to, in a receipt or a commit;
- in split mode, a commit with fewer than the minimum of a site's devices, a sum or a bucket over fewer, or masks that
  are taken away for another set than a commit that was sent.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from fleetfed.shared.aggregate.lanes import Words
from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.wire import codec
from fleetfed.shared.wire.chunks import Assembler
from fleetfed.shared.wire.envelope import Head, MessageKind, open_body, parse_head
from fleetfed.shared.wire.masking import MaskSums
from fleetfed.shared.wire.messages import Commit, Receipt, Reveal
from fleetfed.shared.wire.topics import Broadcast, BroadcastTopic, Kind, MemberTopic, Verb, parse
from tests.simulation.network import Message
from tests.simulation.setting import BELOW, Setting

_LIMIT = 1 << 20
_NEVER = frozenset(
    {
        RejectReason.BAD_BOX,
        RejectReason.BAD_NONCE,
        RejectReason.BODY_MISMATCH,
        RejectReason.CONFLICT,
        RejectReason.NOT_PROPOSED,
        RejectReason.OUT_OF_RANGE,
        RejectReason.REUSED_SEED,
        RejectReason.WRONG_SHAPE,
    }
)
"""Nobody here lies, and what is damaged on its way is never believed far enough to be answered."""


class Ledger:
    """See the module.

    Args:
        setting: the fleet's.
    """

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self.history: list[tuple[int, Message]] = []
        self.accepted: dict[bytes, tuple[str, str, int]] = {}
        """Message id of an update to its device, the gateway that said "accepted", and the round."""
        self.heads: dict[bytes, str] = {}
        """Message id of an update to its head's hash, as commits name it."""
        self.contributions: dict[bytes, Words] = {}
        """Message id of an update to what its device packed, before it was masked."""
        self.secrets: list[bytes] = []
        """All that ever opened a seed or a body."""
        self._senders: dict[bytes, tuple[str, int]] = {}
        self._sets: set[frozenset[bytes]] = set()
        self._said: dict[tuple[object, ...], bytes] = {}
        self._assemblers: dict[tuple[str, str], Assembler] = {}

    def heard(self, port: int, message: Message) -> None:
        """A broker took a message of a member."""
        self.history.append((port, message))
        topic = parse(message.topic)
        if isinstance(topic, BroadcastTopic):
            if topic.what in (Broadcast.PLAN, Broadcast.COSIGN) and message.payload:
                header = parse_head(message.payload).header
                # A plan is the same for all sites, and every gateway passes it on.
                whose = topic.site if header.kind is MessageKind.COSIGN else ""
                self._once(message.payload, header.kind, whose, header.round)
            return
        if not isinstance(topic, MemberTopic):
            return
        if topic.verb is Verb.RECEIPT:
            self._receipt(topic, message.payload)
            return
        judge = self._JUDGES.get(topic.verb)
        if judge is not None:
            assembler = self._assemblers.setdefault((message.publisher, message.topic), Assembler(lambda _head: None))
            with contextlib.suppress(RemoteProtocolError):
                whole = assembler.feed(message.payload)
                if whole is not None:
                    judge(self, topic, whole[0], bytes(whole[1]))

    def unmasking(self, members: Iterable[bytes]) -> None:
        """Masks are about to be taken from sums over these members."""
        assert frozenset(members) in self._sets, "masks are taken away for a set that no commit has"

    # --- One kind of message each -------------------------------------------------------------------------------------

    def _once(self, raw: bytes, *key: object) -> None:
        assert self._said.setdefault(key, raw) == raw, f"two different {key}"

    def _update(self, topic: MemberTopic, head: Head, body: bytes) -> None:
        self._once(head.encode() + body, topic.verb, topic.member, head.header.round)
        self._senders[head.header.message_id] = (topic.member, head.header.round)
        self.heads[head.header.message_id] = head.hash.hex()

    def _proposal(self, topic: MemberTopic, head: Head, body: bytes) -> None:
        self._once(head.encode() + body, topic.verb, topic.member, head.header.round)

    def _commit(self, topic: MemberTopic, head: Head, body: bytes) -> None:
        self._once(head.encode() + body, topic.verb, topic.member, head.header.round)
        commit = codec.decode(Commit, open_body(head.header, body), limit=_LIMIT)
        assert not _NEVER & set(commit.excluded.values()), f"{topic.member}: {commit.excluded}"
        packed = commit.members
        members = frozenset(packed[start : start + 16] for start in range(0, len(packed), 16))
        self._sets.add(members)
        devices = [self._senders[member][0] for member in members]
        assert len(set(devices)) == len(devices), f"a commit has a device twice: {devices}"
        for site, count in Counter(self._setting.devices[device] for device in devices).items():
            assert count >= self._setting.minimum, f"a commit has {count} devices of {site}"

    def _reveal(self, topic: MemberTopic, head: Head, body: bytes) -> None:
        self._once(head.encode() + body, topic.verb, topic.member, head.header.round)
        reveal = codec.decode(Reveal, open_body(head.header, body), limit=_LIMIT)
        for count in (reveal.count, *(bucket.count for bucket in reveal.buckets)):
            assert count >= self._setting.minimum, f"{topic.member} reveals a sum of {count}"

    def _masks(self, topic: MemberTopic, head: Head, body: bytes) -> None:
        masks = codec.decode(MaskSums, open_body(head.header, body), limit=_LIMIT)
        assert masks.reason not in _NEVER, f"{topic.member} gives no masks: {masks.reason}: {masks.detail}"
        if masks.reason is None:
            self._once(head.encode() + body, topic.verb, masks.gateway, head.header.round)

    def _receipt(self, topic: MemberTopic, payload: bytes) -> None:
        head = parse_head(payload)
        receipt = codec.decode(Receipt, open_body(head.header, payload[head.size :]), limit=_LIMIT)
        assert receipt.reason not in _NEVER, f"{topic.member} is told {receipt.reason}: {receipt.detail}"
        if topic.kind is Kind.DEVICE and receipt.reason is None and receipt.message_id in self._senders:
            device, round_ = self._senders[receipt.message_id]
            self.accepted[receipt.message_id] = (device, BELOW[topic.site], round_)

    _JUDGES: ClassVar[dict[Verb, Callable[[Any, MemberTopic, Head, bytes], None]]] = {
        Verb.UPDATE: _update,
        Verb.PROPOSE: _proposal,
        Verb.COMMIT: _commit,
        Verb.REVEAL: _reveal,
        Verb.MASKS: _masks,
    }
