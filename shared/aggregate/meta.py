"""What rides along with an update and is summed by the same additions: counts, weights, metrics, clip statistics.

Each meta word is one whole uint64 word behind the lanes (`lanes.LaneLayout.meta_words`), a non-negative integer;
numbers with a fraction are in fixed point. In order:

====================  =========================================================================================
count                 1
weight                w, 1..weight_cap
examples              training examples seen, over all epochs
training_loss         mean training loss times w, in units of 2**-16
holdout_examples      examples held out
holdout_correct       of these, classified correctly
holdout_loss          sum of their losses, in units of 2**-16
clipped  (T words)    per tensor, clipped coordinates
log2_rms (T words)    per tensor, log2 of the weighted delta's rms plus 24, in units of 2**-8, within 0..32
====================  =========================================================================================

One contribution's word is below 2**46, so that the sum over the largest cohort (100,000, below 2**17) stays below
2**63. Under differential privacy every number that leaves a device would have to be clipped, noised and paid for, so
only two words are left (`MetaLayout.private`)::

    count     1: who takes part is public, only what they say is protected
    beyond    +1 if the delta was longer than the clip, -1 if not, 0 where the clip is fixed; noised like the values

Everything a coordinator may want is a ratio of two sums, so no tier ever averages averages; the mean of
log2_rms is the log of the geometric mean, which one outlier moves little and the range of 32 bounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from fleetfed.shared.aggregate.lanes import Words
from fleetfed.shared.errors import RejectReason, RemoteProtocolError

_FIXED: Final = 1 << 16
_LOG_UNIT: Final = 1 << 8
_LOG_LOW: Final = -24
_LOG_SPAN: Final = 32
_WORD_CAP: Final = (1 << 46) - 1
_SCALARS: Final = 7
_PRIVATE: Final = 2
_MODULUS: Final = 1 << 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """The meta of one device's update.

    Attributes:
        weight: w, at least 1.
        examples: training examples seen, over all epochs.
        training_loss: mean over them.
        holdout_examples: examples held out; 0 for none.
        holdout_correct: of these, classified correctly.
        holdout_loss: mean over them; 0 where there are none.
        clipped: per tensor, from `quantize.Quantized`.
        log2_rms: per tensor, from `quantize.Quantized`.
    """

    weight: int
    examples: int
    training_loss: float
    holdout_examples: int = 0
    holdout_correct: int = 0
    holdout_loss: float = 0.0
    clipped: tuple[int, ...]
    log2_rms: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MetaSum:
    """The meta of ``count`` contributions, as means and totals.

    Attributes:
        count: contributions.
        weight: summed weights.
        examples: training examples seen in all.
        training_loss: weighted mean of the devices' training losses; None under differential privacy, as all that
            follows but ``beyond``.
        holdout_examples: held-out examples in all.
        holdout_accuracy: over all held-out examples; None if there are none.
        holdout_loss: mean over all held-out examples; None if there are none.
        clipped: per tensor, the fraction of the coordinates of all contributions that were clipped.
        log2_rms: per tensor, mean over the contributions.
        beyond: under differential privacy with a clip that adapts: the noised fraction of the contributions that were
            longer than it, perhaps below 0 or above 1; None elsewhere.
    """

    count: int
    weight: int
    examples: int
    training_loss: float | None
    holdout_examples: int
    holdout_accuracy: float | None
    holdout_loss: float | None
    clipped: tuple[float, ...]
    log2_rms: tuple[float, ...]
    beyond: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateMeta:
    """The meta words of a round under differential privacy.

    Attributes:
        adaptive: whether devices say if they were beyond the clip.
        slack: how far noise may carry the sum of what they say.
    """

    adaptive: bool = False
    slack: int = 0


@dataclass(frozen=True, slots=True)
class MetaLayout:
    """How many meta words a model has and what they may say.

    Attributes:
        sizes: coordinates of each tensor.
        weight_cap: largest weight that the plan allows.
        private: the reduced words of a round under differential privacy; None for all of them.
    """

    sizes: tuple[int, ...]
    weight_cap: int = 1
    private: PrivateMeta | None = None

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1 or not 1 <= self.weight_cap <= _WORD_CAP:
            raise ValueError(f"not a meta layout: {self}")

    @property
    def words(self) -> int:
        """M, meta words."""
        return _PRIVATE if self.private is not None else meta_words(len(self.sizes))

    def encode_private(self, *, beyond: bool) -> Words:
        """Return one contribution's meta words under differential privacy: uint64 of shape (words,)."""
        assert self.private is not None
        said = (1 if beyond else -1) if self.private.adaptive else 0
        return self.shift(1, said)

    @staticmethod
    def shift(count: int, said: int) -> Words:
        """The words of ``count`` contributions that said so much, or of noise (of no contribution)."""
        return np.array([count, said % _MODULUS], dtype=np.uint64)

    def encode(self, contribution: Contribution) -> Words:
        """Return one contribution's meta words: uint64 of shape (words,).

        Losses and totals beyond what a word holds are cut to it; a device cannot do better than report the largest.

        Raises:
            ValueError: a count is out of range, a loss is negative or NaN, or a tuple has the wrong length.
        """
        assert self.private is None
        c, t = contribution, len(self.sizes)
        if not 1 <= c.weight <= self.weight_cap or c.examples < 0:
            raise ValueError(f"weight {c.weight} of at most {self.weight_cap}, examples {c.examples}")
        if not 0 <= c.holdout_correct <= c.holdout_examples <= _WORD_CAP:
            raise ValueError(f"{c.holdout_correct} correct of {c.holdout_examples}")
        if len(c.clipped) != t or len(c.log2_rms) != t:
            raise ValueError(f"{len(c.clipped)} clip counts and {len(c.log2_rms)} rms for {t} tensors")
        if any(not 0 <= n <= size for n, size in zip(c.clipped, self.sizes, strict=True)):
            raise ValueError("more coordinates clipped than there are")
        words = [
            1,
            c.weight,
            min(c.examples, _WORD_CAP),
            _fixed(c.training_loss * c.weight),
            c.holdout_examples,
            c.holdout_correct,
            _fixed(c.holdout_loss * c.holdout_examples),
            *c.clipped,
            *(_log_word(value) for value in c.log2_rms),
        ]
        return np.array(words, dtype=np.uint64)

    def decode(self, words: Words, *, count: int | None = None) -> MetaSum:
        """Return what the summed meta words say.

        Args:
            words: uint64, shape (words,).
            count: the contributions that the signed list names; None takes the count word's.

        Raises:
            RemoteProtocolError: WRONG_SHAPE, BELOW_MINIMUM (no contribution at all) or OUT_OF_RANGE, naming the word.
        """
        if words.shape != (self.words,) or words.dtype != np.uint64:
            raise RemoteProtocolError(
                RejectReason.WRONG_SHAPE, f"meta is {words.dtype} of {words.shape}, not uint64 of ({self.words},)"
            )
        if self.private is not None:
            return self._decode_private(int(words[0]), int(words[1]), count, self.private)
        values = [int(word) for word in words]
        n, weight, examples, training, held, correct, loss = values[:_SCALARS]
        t = len(self.sizes)
        clipped, logs = values[_SCALARS : _SCALARS + t], values[_SCALARS + t :]
        _check_count(n, count)
        _check("weight", weight, n, n * self.weight_cap)
        for name, value in (("examples", examples), ("training_loss", training), ("holdout_loss", loss)):
            _check(name, value, 0, n * _WORD_CAP)
        _check("holdout_examples", held, 0, n * _WORD_CAP)
        _check("holdout_correct", correct, 0, held)
        for i, (size, value, log) in enumerate(zip(self.sizes, clipped, logs, strict=True)):
            _check(f"clipped[{i}]", value, 0, n * size)
            _check(f"log2_rms[{i}]", log, 0, n * _LOG_SPAN * _LOG_UNIT)
        return MetaSum(
            count=n,
            weight=weight,
            examples=examples,
            training_loss=training / _FIXED / weight,
            holdout_examples=held,
            holdout_accuracy=correct / held if held else None,
            holdout_loss=loss / _FIXED / held if held else None,
            clipped=tuple(value / (n * size) for value, size in zip(clipped, self.sizes, strict=True)),
            log2_rms=tuple(log / _LOG_UNIT / n + _LOG_LOW for log in logs),
        )

    def _decode_private(self, n: int, word: int, count: int | None, private: PrivateMeta) -> MetaSum:
        _check_count(n, count)
        said = word - _MODULUS if word >= _MODULUS // 2 else word
        most = (n if private.adaptive else 0) + private.slack
        if not -most <= said <= most:
            # How far beyond is not said: nobody has noised it yet, and errors end in logs and messages.
            raise RemoteProtocolError(RejectReason.OUT_OF_RANGE, f"beyond is out of its range, ±{most}")
        return MetaSum(
            count=n,
            weight=n,
            examples=0,
            training_loss=None,
            holdout_examples=0,
            holdout_accuracy=None,
            holdout_loss=None,
            clipped=(),
            log2_rms=(),
            beyond=(said / n + 1) / 2 if private.adaptive else None,
        )


def meta_words(tensors: int) -> int:
    """Return M for a model of so many tensors."""
    return _SCALARS + 2 * tensors


def _fixed(value: float) -> int:
    if not value >= 0:
        raise ValueError(f"a loss must be a number of at least 0, not {value}")
    return round(min(value * _FIXED, float(_WORD_CAP)))


def _log_word(value: float) -> int:
    if math.isnan(value):
        raise ValueError("log2_rms is NaN")
    return round((min(max(value - _LOG_LOW, 0.0), float(_LOG_SPAN))) * _LOG_UNIT)


def _check_count(n: int, count: int | None) -> None:
    if n == 0 and count in (None, 0):
        raise RemoteProtocolError(RejectReason.BELOW_MINIMUM, "a sum of no contributions")
    if count is not None and n != count:
        raise RemoteProtocolError(RejectReason.OUT_OF_RANGE, f"the count word says {n}, the list has {count}")


def _check(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise RemoteProtocolError(RejectReason.OUT_OF_RANGE, f"{name} is {value}, allowed {low}..{high}")
