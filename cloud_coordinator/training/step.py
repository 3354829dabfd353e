"""One step of the global model: from the round's sum to the next version's file and patch. Pure, and deterministic.

The same inputs give the same bytes, whichever process computes them: so a crash in mid-step costs time and nothing
else. No randomness but a key's, no clock; floating point is elementwise float64 in a fixed order. Under differential
privacy the noise comes first, and nothing else here sees the sum without it.

``mean -> server optimizer -> step -> patch (with what the last patch lost) -> file``. The next version is *defined* as
what the patch makes of the base, which is what every device will hold.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Final

import msgpack
import numpy as np
from numpy.typing import NDArray

from fleetfed.cloud_coordinator.config import PatchConfig
from fleetfed.cloud_coordinator.privacy.matrix import MatrixState
from fleetfed.cloud_coordinator.privacy.noising import Noise, add_coordinator_noise
from fleetfed.cloud_coordinator.privacy.settings import PrivacySettings, next_norm
from fleetfed.cloud_coordinator.training.clips import ClipConfig, ClipState, next_clips
from fleetfed.cloud_coordinator.training.optimizers import OptimizerConfig, make_optimizer
from fleetfed.cloud_coordinator.training.robust import Robust, RobustRule
from fleetfed.shared.aggregate.accumulator import Partial, Ring, check_partial
from fleetfed.shared.aggregate.meta import MetaSum
from fleetfed.shared.aggregate.quantize import Grid, mean_delta
from fleetfed.shared.aggregate.scheme import Scheme, scheme_of
from fleetfed.shared.errors import FleetFedError, StorageError
from fleetfed.shared.model.card import ModelCard
from fleetfed.shared.model.patch import Patched, Weights, make_patch
from fleetfed.shared.privacy.mechanism import coordinator_sigma
from fleetfed.shared.wire.messages import Plan

_SUM: Final = RobustRule()


class StepError(FleetFedError):
    """No version can be made of the round; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServerState:
    """What the server carries from version to version.

    Attributes:
        optimizer: `optimizers.ServerOptimizer.state`; empty for the initial one.
        name: which optimizer's state it is.
        residual: what the last patch lost, float32 of shape (dimension,); None for nothing.
    """

    optimizer: bytes = b""
    name: str = ""
    residual: Weights | None = None

    def encode(self) -> bytes:
        """The state's bytes, for the blob store."""
        residual = b"" if self.residual is None else self.residual.astype("<f4").tobytes()
        packed = msgpack.packb([1, self.name, self.optimizer, residual], use_bin_type=True)
        assert isinstance(packed, bytes)
        return packed

    @classmethod
    def decode(cls, data: bytes) -> ServerState:
        """Read what `encode` wrote.

        Raises:
            StorageError: it is damaged.
        """
        try:
            version, name, optimizer, residual = msgpack.unpackb(data, max_bin_len=len(data))
            if version != 1:
                raise StorageError(f"server state of version {version}")
            values: Any = np.frombuffer(residual, dtype="<f4")
        except (ValueError, TypeError) as error:
            raise StorageError(f"the stored server state is damaged: {error}") from error
        return cls(name=name, optimizer=optimizer, residual=values.astype(np.float32) if len(values) else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepConfig:
    """How to step."""

    optimizer: OptimizerConfig
    clips: ClipConfig
    patch: PatchConfig
    privacy: PrivacySettings = field(default_factory=PrivacySettings)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """What a step made.

    Attributes:
        patched: the new file and the patch that makes it.
        state: what the server carries on.
        clips: of the next plan.
        meta: what the devices reported.
        noise: the noise that the next round's is correlated with; None where it is not.
    """

    patched: Patched
    state: ServerState
    clips: ClipState
    meta: MetaSum
    noise: MatrixState | None = None


def scheme_for(plan: Plan, card: ModelCard) -> Scheme:
    """The arithmetic of a plan's round for the model of ``card``.

    Raises:
        RemoteProtocolError: `WRONG_SHAPE`.
    """
    return scheme_of(plan, tuple(slot.size for slot in card.tensors))


def ring_of(plan: Plan, card: ModelCard) -> Ring:
    """The ring of `scheme_for`."""
    return scheme_for(plan, card).ring


def take_step(
    total: Partial,
    *,
    plan: Plan,
    base: bytes,
    card: ModelCard,
    state: ServerState,
    clips: ClipState,
    config: StepConfig,
    robust: RobustRule = _SUM,
    noise: Noise | None = None,
) -> Step:
    """Make the next version.

    Args:
        total: the sum over all committed contributors, at least one.
        plan: of the round.
        base: the file that the plan names.
        card: its card.
        state: what the version before left.
        clips: the plan's clips with what steers them.
        config: how to step.
        robust: how the sums that ``total`` was made of are combined.
        noise: what the coordinator's noise is drawn from, under differential privacy and only there.

    Raises:
        StepError: the sum is impossible, or the optimizer leaves the finite numbers.
        StorageError: the stored state is damaged.
    """
    scheme = scheme_for(plan, card)
    try:
        mean, meta, kept = _mean(total, plan, scheme.grid, robust, noise)
        vector = scheme.lifted(mean)
        del mean
        optimizer = make_optimizer(config.optimizer, plan.dimension)
        # Another optimizer, since the settings changed, begins anew: moments mean nothing to it.
        if state.name == config.optimizer.name:
            optimizer.restore(state.optimizer)
        step = optimizer.step(vector)
        patched = make_patch(
            base,
            step,
            card.table,
            residual=state.residual,
            bits=config.patch.bits,
            clip=config.patch.clip,
            level=config.patch.level or None,
        )
        if plan.privacy is None:
            after = next_clips(clips, meta, config.clips)
        else:
            after = replace(clips, norm=next_norm(plan, meta, config.privacy))
    except StorageError:
        raise
    except (ValueError, FleetFedError) as error:
        raise StepError(f"the round's sum cannot be applied: {error}") from error
    return Step(
        patched=patched,
        state=ServerState(name=config.optimizer.name.value, optimizer=optimizer.state(), residual=patched.residual),
        clips=after,
        meta=meta,
        noise=kept,
    )


def _mean(
    total: Partial, plan: Plan, grid: Grid, robust: RobustRule, noise: Noise | None
) -> tuple[NDArray[np.float64], MetaSum, MatrixState | None]:
    """The fleet's delta, what it reported, and the noise to keep; where it is private, nothing without its noise."""
    assert (plan.privacy is None) == (noise is None)
    if plan.privacy is None or noise is None:
        meta = check_partial(total)
        return robust.mean(total, grid, weight=meta.weight), meta, None
    noised = add_coordinator_noise(total, plan.privacy, noise)
    if robust.rule is Robust.NONE:
        return mean_delta(noised.values, grid, weight=noised.meta.weight), noised.meta, noised.state
    # Every bucket has its devices' noise in it; the coordinator adds none there.
    assert coordinator_sigma(plan.privacy)[0] == 0
    return robust.mean(total, grid, weight=noised.meta.weight), noised.meta, noised.state
