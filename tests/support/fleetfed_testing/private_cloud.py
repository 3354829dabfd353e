"""A scripted gateway whose devices clip, round and say nothing beside."""

from __future__ import annotations

import numpy as np

from fleetfed.shared.aggregate.accumulator import Ring
from fleetfed.shared.aggregate.body import encode_body
from fleetfed.shared.aggregate.scheme import scheme_of
from fleetfed.shared.privacy.clipping import clip_and_round
from fleetfed.shared.trust.certificates import Role
from fleetfed.shared.wire.envelope import Digest, MessageKind
from fleetfed.shared.wire.messages import Plan
from fleetfed_testing.cloud import ScriptedGateway, Update, extension_of, small_model

SIZES = tuple(slot.size for slot in small_model()[1].tensors)


class PrivateGateway(ScriptedGateway):
    """Its devices' deltas are all the same, and clipped."""

    length = 5.0

    def train(self, plan: Plan, plan_hash: Digest, ring: Ring, *, seed: int = 0) -> list[Update]:
        made = []
        scheme = scheme_of(plan, SIZES)
        assert plan.privacy is not None
        for index, device in enumerate(self.devices):
            delta = np.full(sum(SIZES), self.length / np.sqrt(sum(SIZES)))
            clipped = clip_and_round(
                delta, scheme.grid, clip=plan.privacy.clip, rng=np.random.default_rng((seed, index))
            )
            meta = ring.meta.encode_private(beyond=clipped.beyond)
            message = self.fleet.signer(Role.DEVICE, device, self.name).sign_raw(
                MessageKind.UPDATE,
                encode_body(clipped.values, meta, limit=ring.own_limit),
                raw_size=ring.layout.dimension,
                compressed=True,
                now=plan.opened,
                round=plan.round,
                extension=extension_of(plan, plan_hash, ring).encode(),
            )
            made.append(Update(device, message, clipped.values, meta))
        self.updates |= {update.message.id: update for update in made}
        return made
