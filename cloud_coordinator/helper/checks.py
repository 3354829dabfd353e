"""What a helper checks of a request before it gives masks: all of it, itself, from the signed messages alone.

Without that, gateway and coordinator would hand it a set of one. In this order:

1. the plan: the coordinator's, of the policy, masked, not over, and it names a key of this helper's;
2. the proposal: a gateway's, for that plan;
3. the commit: the coordinator's, for that proposal and gateway;
4. every member: proposed, once, its head a certified device's that is not revoked, for that plan and of its shape;
5. per site: enough members and owners, not too many left out; in each bucket too;
6. with buckets: the nonce of every site is the one that was committed to;
7. every seed: sealed for this helper, to this header, and no other update's.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from fleetfed.cloud_coordinator.helper.events import Claim, Key
from fleetfed.cloud_coordinator.helper.state import SKEW
from fleetfed.shared.aggregate.lanes import LaneLayout
from fleetfed.shared.aggregate.scheme import scheme_of
from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.secure.box import Reader, SealSecret
from fleetfed.shared.secure.buckets import check_nonce, deal
from fleetfed.shared.secure.split import add_masks, binding_of, body_size, mask_key, open_seed
from fleetfed.shared.trust.certificates import Certificate, claimed_site
from fleetfed.shared.trust.verifier import Verifier
from fleetfed.shared.wire.envelope import Digest, Head, MessageId, MessageKind, parse_head
from fleetfed.shared.wire.masking import MAX_NAMED, MaskRequest, Split, check_key
from fleetfed.shared.wire.messages import Commit, Mode, Plan, Proposal, max_proposal
from fleetfed.shared.wire.selection import takes
from fleetfed.shared.wire.update import SPLIT, UpdateExtension

T = TypeVar("T")

_BOXES: Final = 3
_LEAF_MAY_ADMIT: Final = frozenset(
    {
        RejectReason.REVOKED,
        RejectReason.EXPIRED,
        RejectReason.EXPIRED_CERTIFICATE,
        RejectReason.NOT_SELECTED,
    }
)
"""Faults of a head that its leaf gateway cannot see, or not yet."""


class BadSeedsError(RemoteProtocolError):
    """Seeds that the devices themselves spoilt: nobody else can sign a head with a box that does not open.

    Attributes:
        devices: whose they are; at most `MAX_NAMED` of them.
    """

    def __init__(self, reason: RejectReason, devices: Iterable[str]) -> None:
        found = sorted(devices)
        self.devices = tuple(found[:MAX_NAMED])
        super().__init__(reason, f"{len(found)} devices, the first of them {', '.join(found[:3])}")


def _refused(reason: RejectReason, detail: str) -> RemoteProtocolError:
    return RemoteProtocolError(reason, detail)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A request in which everything holds.

    Attributes:
        claim: what it wants.
        commit: head hash of the commit.
        sums: the keys of the masks in each sum, in the order of the answer.
        n_words: words in a sum.
    """

    claim: Claim
    commit: Digest
    sums: tuple[tuple[bytes, ...], ...]
    n_words: int

    def add_up(self) -> tuple[bytes, ...]:
        """The sums of masks, as they travel."""
        return tuple(self._sum(keys) for keys in self.sums)

    def _sum(self, keys: Iterable[bytes]) -> bytes:
        words = LaneLayout(self.n_words, 64).zeros()
        add_masks(words, keys)
        return words.astype("<u8", copy=False).tobytes()


@dataclass(frozen=True, slots=True)
class _Member:
    head: Head
    certificate: Certificate


def verify(
    request: MaskRequest,
    question: Digest,
    *,
    verifier: Verifier,
    key: Callable[[bytes], Key | None],
    secret: Callable[[bytes], SealSecret],
    now: int,
) -> Job:
    """Check a request, see the module.

    Args:
        request: decoded, from a message that the coordinator signed.
        question: hash of its body.
        verifier: of the fleet.
        key: returns the helper's key of a signed `SealKey`, None for none of its own.
        secret: returns the secret of a public key.
        now: unix milliseconds.

    Raises:
        RemoteProtocolError: the first check that fails; where it is the last one, `BadSeedsError`.
    """
    plan, plan_hash, own = _plan(request, verifier=verifier, key=key, now=now)
    split = plan.split
    assert split is not None
    layout = layout_of(plan)
    most = max_proposal(plan.quorum.cohort_cap)
    proposal, proposal_head, gateway = _open(verifier, request.proposal, Proposal, MessageKind.PROPOSE, now, most)
    if proposal.plan != plan_hash or proposal_head.header.round != plan.round:
        raise _refused(RejectReason.WRONG_PLAN, "the proposal is for another plan")
    commit, commit_head, _ = _open(verifier, request.commit, Commit, MessageKind.COMMIT, now, most)
    if commit.plan != plan_hash or commit_head.header.round != plan.round:
        raise _refused(RejectReason.WRONG_PLAN, "the commit is for another plan")
    if commit.proposal != proposal_head.hash or commit.gateway != gateway.id:
        raise _refused(RejectReason.NOT_PROPOSED, "the commit answers another proposal")
    members, left_out = _members(proposal, commit)

    def check(head: Head) -> Certificate:
        return _check_head(head, plan, plan_hash, layout, verifier=verifier, now=now)

    checked = {name: _verified(heads, check) for name, heads in members.items()}
    sites = _by_site(checked)
    _check_sites(sites, _sites_left_out(left_out, check), plan, split)
    groups = _groups(sites, request.nonces, proposal, commit, split)
    keys = _mask_keys(checked, secret(own.public))
    claim = Claim(
        question=question,
        round=plan.round,
        plan=plan_hash,
        gateway=gateway.id,
        key=own.public,
        devices=frozenset(member.certificate.id for member in checked.values()),
    )
    sums = tuple(tuple(keys[name] for name in group) for group in groups)
    return Job(claim=claim, commit=commit_head.hash, sums=sums, n_words=layout.n_words)


def layout_of(plan: Plan) -> LaneLayout:
    """The layout of a plan's words: how many coordinates each tensor has does not matter to it, only how many tensors.

    Raises:
        RemoteProtocolError: `WRONG_SHAPE`: the plan does not fit together.
    """
    tensors = len(plan.quantization.clips)
    if plan.projection is not None:
        if plan.projection.dimension > plan.dimension:
            raise _refused(RejectReason.WRONG_SHAPE, f"{plan.projection.dimension} values travel of {plan.dimension}")
        # The model is not known here; what travels is, and that alone matters.
        plan = replace(plan, projection=None, dimension=plan.projection.dimension)
    if plan.dimension < tensors:
        raise _refused(RejectReason.WRONG_SHAPE, f"{plan.dimension} values in {tensors} tensors")
    return scheme_of(plan, (plan.dimension - tensors + 1, *(1,) * (tensors - 1))).ring.layout


def _plan(
    request: MaskRequest, *, verifier: Verifier, key: Callable[[bytes], Key | None], now: int
) -> tuple[Plan, Digest, Key]:
    plan, head, _ = verifier.open(request.plan, Plan, kind=MessageKind.PLAN, now=now)
    verifier.check_plan(plan, now=now)
    if plan.mode is not Mode.SPLIT or plan.split is None or not plan.split.helper:
        raise _refused(RejectReason.WRONG_PLAN, "the plan has no second seed holder")
    if head.header.round != plan.round:
        raise _refused(RejectReason.WRONG_ROUND, f"round {head.header.round} and {plan.round}")
    if now > plan.expires + SKEW:
        raise _refused(RejectReason.LATE, f"round {plan.round} was over at {plan.expires}")
    own = key(plan.split.helper)
    if own is None:
        raise _refused(RejectReason.WRONG_PLAN, "the plan names a key that is not, or no longer, this helper's")
    check_key(plan.split.suite, own.public)
    if plan.expires > own.expires:
        raise _refused(RejectReason.EXPIRED, f"the round ends at {plan.expires}, its key at {own.expires}")
    return plan, head.hash, own


def _open(
    verifier: Verifier, data: bytes, cls: type[T], kind: MessageKind, now: int, limit: int
) -> tuple[T, Head, Certificate]:
    header = parse_head(data).header
    if max(header.body_size, header.raw_size) > limit:
        raise _refused(RejectReason.TOO_LARGE, f"{kind.name}: {header.raw_size} bytes, limit {limit}")
    return verifier.open(data, cls, kind=kind, now=now)


def _members(proposal: Proposal, commit: Commit) -> tuple[dict[MessageId, list[Head]], list[Head]]:
    """Per committed member the heads that may be meant, as a rule one, and those that are left out."""
    names = [MessageId(commit.members[at : at + 16]) for at in range(0, len(commit.members), 16)]
    if len(commit.members) % 16 or not names or any(a >= b for a, b in itertools.pairwise(names)):
        raise _refused(RejectReason.MALFORMED, f"{len(commit.members)} bytes of members, or not sorted")
    found: dict[MessageId, list[Head]] = {name: [] for name in names}
    left_out: list[Head] = []
    for raw in dict.fromkeys(proposal.heads):
        try:
            head = parse_head(raw)
        except RemoteProtocolError:
            continue
        if head.size != len(raw):
            continue
        meant = head.hash.hex() not in commit.excluded
        (found[head.header.message_id] if meant and head.header.message_id in found else left_out).append(head)
    if missing := sum(not heads for heads in found.values()):
        raise _refused(RejectReason.NOT_PROPOSED, f"{missing} members were not proposed")
    return found, left_out


def _verified(heads: Iterable[Head], check: Callable[[Head], Certificate]) -> _Member:
    """The one of these heads that is good: in a tree another gateway may have added junk with the same id."""
    good: list[_Member] = []
    refused: RemoteProtocolError | None = None
    for head in heads:
        try:
            good.append(_Member(head, check(head)))
        except RemoteProtocolError as error:
            refused = refused or error
    if not good:
        assert refused is not None
        raise refused
    if len({member.head.hash for member in good}) > 1:
        raise _refused(RejectReason.DUPLICATE, "two heads with the id of one member")
    return good[0]


def _sites_left_out(heads: Iterable[Head], check: Callable[[Head], Certificate]) -> Counter[str | None]:
    """How many of each site are left out that its gateway may have admitted: junk in its name does not count."""
    sites: Counter[str | None] = Counter()
    for head in heads:
        try:
            check(head)
        except RemoteProtocolError as error:
            if error.reason not in _LEAF_MAY_ADMIT:
                continue
        sites[claimed_site(head.certificate)] += 1
    return sites


def _check_head(
    head: Head, plan: Plan, plan_hash: Digest, layout: LaneLayout, *, verifier: Verifier, now: int
) -> Certificate:
    assert plan.split is not None
    header = head.header
    certificate = verifier.head(head, kind=MessageKind.UPDATE, now=now)
    extension = UpdateExtension.decode(head)
    if extension.plan != plan_hash or header.round != plan.round:
        raise _refused(RejectReason.WRONG_PLAN, f"{certificate.id} answers another plan")
    if extension.model_sha256 != plan.model_sha256:
        raise _refused(RejectReason.WRONG_MODEL, certificate.id)
    shape = (extension.mode, extension.suite, extension.bits, extension.lane_bits, extension.dimension)
    due = (SPLIT, plan.split.suite, plan.quantization.bits, plan.quantization.lane_bits, layout.dimension)
    rest = (extension.meta_words, len(extension.boxes), header.body_size, header.raw_size, header.compressed)
    size = body_size(layout.n_words)
    if (*shape, *rest) != (*due, layout.meta_words, _BOXES, size, size, False):
        raise _refused(RejectReason.WRONG_SHAPE, f"{certificate.id}: {shape}, {rest}")
    if not takes(plan_hash, certificate.id, plan.eligibility):
        raise _refused(RejectReason.NOT_SELECTED, certificate.id)
    return certificate


def _by_site(members: Mapping[MessageId, _Member]) -> dict[str, dict[MessageId, _Member]]:
    sites: dict[str, dict[MessageId, _Member]] = {}
    devices: set[str] = set()
    for name, member in members.items():
        if member.certificate.id in devices:
            raise _refused(RejectReason.DUPLICATE, f"two updates of {member.certificate.id}")
        devices.add(member.certificate.id)
        sites.setdefault(member.certificate.site, {})[name] = member
    return dict(sorted(sites.items()))


def _check_sites(
    sites: Mapping[str, Mapping[MessageId, _Member]], missing: Mapping[str | None, int], plan: Plan, split: Split
) -> None:
    for site, members in sites.items():
        owners = {member.certificate.owner for member in members.values()}
        if len(members) < split.minimum_cohort:
            raise _refused(RejectReason.BELOW_MINIMUM, f"{len(members)} members of {site}")
        if len(owners) < split.minimum_owners:
            raise _refused(RejectReason.BELOW_OWNERS, f"{len(owners)} owners at {site}")
        if len(members) > plan.quorum.cohort_cap:
            raise _refused(RejectReason.COHORT_FULL, f"{len(members)} members of {site}")
        left_out = missing.get(site, 0)
        if left_out > max(2, (len(members) + left_out) // 20):
            raise _refused(RejectReason.TOO_MANY_EXCLUDED, f"{left_out} of {site} are left out")


def _groups(
    sites: Mapping[str, Mapping[MessageId, _Member]],
    nonces: Mapping[str, bytes],
    proposal: Proposal,
    commit: Commit,
    split: Split,
) -> list[tuple[MessageId, ...]]:
    """Who is in which sum, in the order of the answer."""
    if not split.bucket:
        if nonces:
            raise _refused(RejectReason.BAD_NONCE, "nonces where the plan has no buckets")
        return [tuple(name for members in sites.values() for name in members)]
    if nonces.keys() != sites.keys():
        raise _refused(RejectReason.BAD_NONCE, f"nonces of {sorted(nonces)}, members of {sorted(sites)}")
    hashes = Counter(each.site for each in proposal.nonces)
    committed = {each.site: each.hash for each in proposal.nonces if hashes[each.site] == 1}
    groups: list[tuple[MessageId, ...]] = []
    for site, members in sites.items():
        check_nonce(nonces[site], committed.get(site, b""))
        groups += deal(
            {name: member.certificate.owner for name, member in members.items()},
            split.bucket,
            minimum_owners=split.minimum_owners,
            gateway_nonce=nonces[site],
            coordinator_nonce=commit.nonce,
        )
    return groups


def _mask_keys(members: Mapping[MessageId, _Member], secret: SealSecret) -> dict[MessageId, bytes]:
    seeds: dict[bytes, str] = {}
    keys: dict[MessageId, bytes] = {}
    bad: set[str] = set()
    reused: set[str] = set()
    for name, member in members.items():
        device = member.certificate.id
        try:
            seed = open_seed(member.head, Reader.HELPER, secret)
        except RemoteProtocolError:
            bad.add(device)
            continue
        if seed in seeds:
            reused |= {device, seeds[seed]}
        seeds[seed] = device
        keys[name] = mask_key(seed, binding_of(member.head))
    if bad or reused:
        raise BadSeedsError(RejectReason.BAD_BOX if bad else RejectReason.REUSED_SEED, bad or reused)
    return keys
