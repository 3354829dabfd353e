"""The clips and bits of the next round's plan: a scale that all devices share and that follows how far they move.

A common scale makes sums exact, but a clip that does not fit costs twice: too small and updates are cut, too large
and the few levels of a low-bit grid all round to zero. So each tensor's clip follows the aggregate's own report:

- ``clip = multiplier * 2**mean(log2_rms)``: the geometric mean over the contributions of the weighted delta's rms,
  which one device that moves far (or lies) shifts little;
- the multiplier of a tensor is steered by the fraction that was clipped there: above the target it grows, well below
  it shrinks back, never below what the configuration asks for nor above eight times it, because a heavy-tailed tensor
  needs a larger multiple of its rms than a smooth one;
- a clip moves by at most a factor of eight per round.

The first round knows nothing of the devices: its clips come from the model's own weights, and it is given more bits,
so that a clip that is far too large still resolves the deltas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fleetfed.shared.aggregate.meta import MetaSum
from fleetfed.shared.errors import ConfigError, StorageError

_FLOOR: Final = 2.0**-40
_CEILING: Final = 2.0**20
_MOST_PER_ROUND: Final = 8.0
_MOST_MULTIPLIER: Final = 8.0
_GROW: Final = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipConfig:
    """How clips follow the deltas.

    Attributes:
        bits: of every round but the first.
        first_bits: of the first round.
        multiplier: the clip in units of the deltas' rms; with b bits one level is multiplier / (2**(b-1) - 1) rms.
        target: fraction of a tensor's coordinates that may be clipped before its multiplier grows.
        first_share: the first round's clip in units of the rms of the tensor's weights.
    """

    bits: int = 4
    first_bits: int = 8
    multiplier: float = 16.0
    target: float = 0.005
    first_share: float = 4.0

    def __post_init__(self) -> None:
        if not (2 <= self.bits <= 16 and 2 <= self.first_bits <= 16):
            raise ConfigError(f"bits and first_bits must be in 2..16, not {self.bits} and {self.first_bits}")
        if not (0.5 <= self.multiplier <= 64 and 0 < self.target < 1 and 1e-3 <= self.first_share <= 100):
            raise ConfigError("clip multiplier must be in 0.5..64, target in (0, 1), first_share in 0.001..100")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipState:
    """The clips of the next plan and what it takes to find those after it.

    Attributes:
        bits: of the next plan.
        clips: per tensor, float32 values.
        multipliers: per tensor.
        norm: under differential privacy, how long a delta may be in units of the weights, where that adapts; it takes
            the place of the clips, which would say more of the devices than was paid for. 0 for nothing known yet.
    """

    bits: int
    clips: tuple[float, ...]
    multipliers: tuple[float, ...]
    norm: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists, for a database or msgpack."""
        kept: dict[str, Any] = {
            "bits": self.bits,
            "clips": list(self.clips),
            "multipliers": list(self.multipliers),
        }
        return kept | ({"norm": self.norm} if self.norm else {})

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> ClipState:
        """Return what `to_dict` was called on.

        Raises:
            StorageError: something is missing, or not the number it should be.
        """
        try:
            bits = int(stored["bits"])
            clips = tuple(float(value) for value in stored["clips"])
            multipliers = tuple(float(value) for value in stored["multipliers"])
            norm = float(stored.get("norm", 0.0))
        except (KeyError, TypeError, ValueError) as error:
            raise StorageError(f"the stored clips are damaged: {error!r}") from error
        good = 2 <= bits <= 16 and clips and len(clips) == len(multipliers)
        sound = all(math.isfinite(value) and value > 0 for value in (*clips, *multipliers))
        if not good or not sound or not 0 <= norm < math.inf:
            raise StorageError("the stored clips are damaged")
        return cls(bits=bits, clips=clips, multipliers=multipliers, norm=norm)


def first_clips(weights: NDArray[np.float32], sizes: Sequence[int], config: ClipConfig) -> ClipState:
    """Return the first plan's clips, from nothing but the model.

    Args:
        weights: the initial model, float32 of shape (sum of sizes,).
        sizes: coordinates of each tensor.
        config: how.

    Raises:
        ValueError: the sizes do not fit the weights, or these are not finite.
    """
    if weights.shape != (sum(sizes),) or not np.isfinite(weights).all():
        raise ValueError(f"{weights.shape} weights for tensors of {tuple(sizes)}, or not finite")
    rms, at = [], 0
    for size in sizes:
        part = weights[at : at + size].astype(np.float64)
        rms.append(math.sqrt(float(np.dot(part, part)) / size))
        at += size
    moving = sorted(value for value in rms if value > 0)
    # Biases start at zero, which says nothing about how far they will go: give them the median of the others.
    usual = moving[len(moving) // 2] if moving else 0.1
    clips = tuple(_bound(config.first_share * (value if value > 0 else usual)) for value in rms)
    return ClipState(bits=config.first_bits, clips=clips, multipliers=(config.multiplier,) * len(clips))


def next_clips(state: ClipState, meta: MetaSum, config: ClipConfig) -> ClipState:
    """Return the clips of the plan after the round whose aggregate said ``meta``.

    Args:
        state: the clips of that round.
        meta: the aggregate's meta words.
        config: how; may have changed since the round before.

    Raises:
        ValueError: the meta is of another number of tensors.
    """
    if len(meta.clipped) != len(state.clips):
        raise ValueError(f"meta of {len(meta.clipped)} tensors for {len(state.clips)} clips")
    clips, multipliers = [], []
    for clip, multiplier, clipped, log2_rms in zip(
        state.clips, state.multipliers, meta.clipped, meta.log2_rms, strict=True
    ):
        wanted = multiplier * 2.0**log2_rms
        # The fraction judges the multiplier only where the clip was close to what the multiplier asks for: after a
        # first round, or while the deltas shrink fast, it says something about the clip instead.
        if 0.5 <= clip / wanted <= 2:
            if clipped > config.target:
                multiplier *= _GROW
            elif clipped < config.target / 4:
                multiplier /= _GROW
        multiplier = min(max(multiplier, config.multiplier), config.multiplier * _MOST_MULTIPLIER)
        wanted = multiplier * 2.0**log2_rms
        clips.append(_bound(min(max(wanted, clip / _MOST_PER_ROUND), clip * _MOST_PER_ROUND)))
        multipliers.append(multiplier)
    return ClipState(bits=config.bits, clips=tuple(clips), multipliers=tuple(multipliers))


def _bound(clip: float) -> float:
    return float(np.float32(min(max(clip, _FLOOR), _CEILING)))
