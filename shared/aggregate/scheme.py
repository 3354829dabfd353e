"""What the numbers of one round mean: derived from the signed plan and the model's tensors, by every tier alike."""

from __future__ import annotations

from dataclasses import dataclass

from fleetfed.shared.aggregate.accumulator import Ring, RingNoise
from fleetfed.shared.aggregate.projection import Floats, Matrix, Subspace, check_projection
from fleetfed.shared.aggregate.quantize import Grid
from fleetfed.shared.errors import RejectReason, RemoteProtocolError
from fleetfed.shared.wire.messages import Mode, Plan
from fleetfed.shared.wire.projection import Projection


@dataclass(frozen=True, slots=True)
class Scheme:
    """The arithmetic of a round.

    Attributes:
        ring: lanes, meta words and limits; its dimension is that of the vectors that travel.
        grid: the integers that a device may say, for the coordinates that travel.
        sizes: values of each tensor of the model.
        projection: how they travel; None for as they are.
    """

    ring: Ring
    grid: Grid
    sizes: tuple[int, ...] = ()
    projection: Projection | None = None

    def travelling(self, delta: Floats) -> Floats:
        """What travels of an update, shape (grid.dimension,); the update itself where all of it does."""
        return delta if self.projection is None else Subspace(self.projection, self.sizes).project(delta)

    def lifted(self, mean: Matrix) -> Matrix:
        """The model's update from the mean of what travelled."""
        return mean if self.projection is None else Subspace(self.projection, self.sizes).lift(mean)


def scheme_of(plan: Plan, sizes: tuple[int, ...]) -> Scheme:
    """The scheme that a plan fixes for a model.

    Args:
        plan: as signed.
        sizes: coordinates of each tensor of the model.

    Raises:
        RemoteProtocolError: `WRONG_SHAPE`: plan and model do not fit each other, or the lanes could overflow.
    """
    quantization = plan.quantization
    try:
        if sum(sizes) != plan.dimension or len(quantization.clips) != len(sizes):
            raise ValueError(
                f"{plan.dimension} values and {len(quantization.clips)} clips for a model of {len(sizes)} tensors "
                f"with {sum(sizes)} values"
            )
        if (plan.mode is Mode.SPLIT) != (plan.split is not None):
            raise ValueError(f"a plan in {plan.mode} mode {'without' if plan.split is None else 'with'} masks")
        noise = _checked_noise(plan)
        travelling = sizes
        if plan.projection is not None:
            if plan.privacy is not None or quantization.error_feedback:
                raise ValueError("a projection goes neither with differential privacy nor with error feedback")
            check_projection(plan.projection, sizes)
            travelling = plan.projection.sizes
        ring = Ring.of(
            travelling,
            bits=quantization.bits,
            lane_bits=quantization.lane_bits,
            weight_cap=quantization.weight_cap,
            noise=noise,
            most=plan.quorum.cohort_cap,
        )
        if plan.quorum.cohort_cap > ring.capacity:
            raise ValueError(f"a cohort of {plan.quorum.cohort_cap} on a ring for {ring.capacity}")
        grid = Grid(travelling, quantization.clips, quantization.bits, quantization.weight_cap)
    except ValueError as error:
        raise RemoteProtocolError(RejectReason.WRONG_SHAPE, str(error)) from error
    return Scheme(ring=ring, grid=grid, sizes=sizes, projection=plan.projection)


def _checked_noise(plan: Plan) -> RingNoise | None:
    """The noise that lanes need room for.

    Raises:
        ValueError: the plan's privacy cannot be what it says.
    """
    if plan.privacy is None:
        return None
    # Imported late: a device in rounds without differential privacy carries nothing of this.
    from fleetfed.shared.privacy.mechanism import check_privacy, ring_noise

    check_privacy(plan)
    return ring_noise(plan.privacy)
