"""The floor that the fleet's owners set offline, below which no plan is obeyed (docs/privacy.md).

The coordinator's online key signs plans; the policy is signed by keys that are not online. So whoever takes over the
coordinator can stop the fleet, but cannot tell its devices "this round: plain", "a cohort of one" or "no noise".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.wire import limits
from fleetfed.shared.wire.codec import Length, Range
from fleetfed.shared.wire.fields import Bytes32, Count
from fleetfed.shared.wire.masking import HYBRID, SEALED_BOX
from fleetfed.shared.wire.messages import Mode, Plan
from fleetfed.shared.wire.privacy import Mechanism


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyFloor:
    """The least differential privacy that a plan must promise.

    Attributes:
        mechanisms: which ones count.
        noise_multiplier: at least so much noise.
        max_participations: at most so many rounds per device.
        min_separation: at least so many rounds apart.
        max_epsilon, max_delta: the guarantee that the plan states may not be weaker.
    """

    mechanisms: Annotated[tuple[Mechanism, ...], Length(1, 8)] = tuple(Mechanism)
    noise_multiplier: Annotated[float, Range(0.0, 1e6)] = 0.0
    max_participations: Annotated[int, Range(1, 1_000_000)] = 1_000_000
    min_separation: Annotated[int, Range(1, 1_000_000)] = 1
    max_epsilon: Annotated[float, Range(0.0, 1e9)] = 1e9
    max_delta: Annotated[float, Range(0.0, 1.0)] = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """See the module. The defaults forbid nothing that the software can do.

    Attributes:
        version: grows with every policy; a plan names the one it was made under.
        modes: allowed ones.
        suites: allowed encryption suites; ``[3]`` refuses whatever a quantum computer could open later.
        seed_holders: fewest parties between whom mask seeds are split: 1 (coordinator) or 2 (and a helper).
        minimum_cohort: fewest contributors to any sum that leaves a leaf gateway in split mode.
        minimum_owners: fewest distinct owners among them.
        minimum_lane_bits, maximum_bits: bounds of the ring: narrow lanes overflow, wide symbols dominate a sum.
        weight_cap: largest weight_cap; a device of weight w counts for w others.
        privacy: what a plan must promise; None for nothing.
        cards: BLAKE2b-256 of the model cards (architectures) that may be trained; empty for any.
        largest_step: largest root mean square by which one version's weights may differ from the one before, which
            bounds what a coordinator can plant in a model to read devices ("trap weights"); 0 for no bound. How it is
            judged is in `shared.model.step`.
        models: SHA-256 of model files that the owners vouch for: ``largest_step`` does not bind the step to them.
    """

    version: Count = 0
    modes: Annotated[tuple[Mode, ...], Length(1, 8)] = tuple(Mode)
    suites: Annotated[tuple[int, ...], Length(1, 8)] = (SEALED_BOX, HYBRID)
    seed_holders: Annotated[int, Range(1, 2)] = 1
    minimum_cohort: Annotated[int, Range(1, limits.MAX_COHORT)] = 1
    minimum_owners: Annotated[int, Range(1, limits.MAX_COHORT)] = 1
    minimum_lane_bits: Annotated[int, Range(4, 64)] = 4
    maximum_bits: Annotated[int, Range(2, 16)] = 16
    weight_cap: Annotated[int, Range(1, 2**31 - 1)] = 2**31 - 1
    privacy: PrivacyFloor | None = None
    cards: Annotated[tuple[Bytes32, ...], Length(0, 1000)] = field(default_factory=tuple)
    largest_step: Annotated[float, Range(0.0, 1e6)] = 0.0
    models: Annotated[tuple[Bytes32, ...], Length(0, 1000)] = field(default_factory=tuple)


def check_plan(plan: Plan, policy: Policy) -> None:
    """Refuse a plan that is weaker than the policy.

    Raises:
        RemoteProtocolError: `BELOW_POLICY`, naming the first rule that it breaks.
    """
    for broken in _broken(plan, policy):
        raise RemoteProtocolError(RejectReason.BELOW_POLICY, broken)


def _broken(plan: Plan, policy: Policy) -> list[str]:
    found = []

    def need(holds: bool, what: str) -> None:
        if not holds:
            found.append(what)

    need(plan.policy >= policy.version, f"made under policy {plan.policy}, in force is {policy.version}")
    need(plan.mode in policy.modes, f"mode {plan.mode} is not allowed")
    quantization, split, privacy, floor = plan.quantization, plan.split, plan.privacy, policy.privacy
    need(quantization.lane_bits >= policy.minimum_lane_bits, f"lanes of {quantization.lane_bits} bits")
    need(quantization.bits <= policy.maximum_bits, f"symbols of {quantization.bits} bits")
    need(quantization.weight_cap <= policy.weight_cap, f"weights up to {quantization.weight_cap}")
    if plan.mode is Mode.SPLIT and split is not None:
        need(split.suite in policy.suites, f"suite {split.suite}")
        need(bool(split.helper) or policy.seed_holders == 1, "one seed holder where two are due")
        need(split.minimum_cohort >= policy.minimum_cohort, f"cohorts from {split.minimum_cohort}")
        need(split.minimum_owners >= policy.minimum_owners, f"owners from {split.minimum_owners}")
        need(split.bucket == 0 or split.bucket >= split.minimum_cohort, f"buckets of {split.bucket}")
    if floor is not None:
        if privacy is None:
            need(False, "no differential privacy")
        else:
            need(privacy.mechanism in floor.mechanisms, f"mechanism {privacy.mechanism}")
            need(privacy.noise_multiplier >= floor.noise_multiplier, f"noise multiplier {privacy.noise_multiplier:g}")
            need(
                privacy.max_participations <= floor.max_participations,
                f"{privacy.max_participations} participations",
            )
            need(privacy.min_separation >= floor.min_separation, f"separation {privacy.min_separation}")
            need(privacy.epsilon <= floor.max_epsilon, f"epsilon {privacy.epsilon:g}")
            need(privacy.delta <= floor.max_delta, f"delta {privacy.delta:g}")
    return found
