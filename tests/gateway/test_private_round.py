"""Noise at a gateway: one sum has one noise, whatever becomes of the gateway, and no two sums have the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fleetfed_testing.gateway_bench import Bench
from fleetfed_testing.gateway_split import SplitRound
from fleetfed_testing.signed_fleet import SignedFleet

from fleetfed.shared.aggregate.scheme import scheme_of
from fleetfed.shared.privacy.mechanism import LEAST_SIGMA
from fleetfed.shared.wire.messages import Quantization, Weighting
from fleetfed.shared.wire.privacy import Mechanism, Privacy

PRIVACY = Privacy(
    mechanism=Mechanism.SPLIT_CENTRAL,
    clip=300.0,
    noise_multiplier=1.0,
    max_participations=10,
    epsilon=20.0,
    delta=1e-6,
)


class PrivateRound(SplitRound):
    """Devices of which each sends so many levels everywhere."""

    def update(self, name: str, **changes: Any) -> Any:
        if name not in self.updates:
            ring = scheme_of(self.plan, self.fleet.sizes).ring
            values = np.full(sum(self.fleet.sizes), self.names.index(name) + 1, dtype=np.int64)
            words = ring.layout.pack(values, ring.meta.encode_private(beyond=False))
            self.updates[name] = self.bench.masked(
                name, self.plan, self.hash, words=words, meta_words=ring.meta.words, bits=ring.bits
            )
        return self.updates[name]

    async def open(self) -> PrivateRound:
        self._plan |= {
            "privacy": PRIVACY,
            "weighting": Weighting.UNIFORM,
            "quantization": Quantization(bits=8, lane_bits=32, clips=(1.0,) * len(self.fleet.sizes), weight_cap=1),
        }
        await super().open()
        return self


def noise_in(site: PrivateRound, words: bytes, *names: str) -> Any:
    ring = scheme_of(site.plan, site.fleet.sizes).ring
    values, _ = site.fleet.unmask(site.heads(*names), words, ring=ring)
    return values - sum(site.names.index(name) + 1 for name in names or site.names)


@pytest.mark.parametrize("bucket", [0, 2])
async def test_a_gateway_whose_disk_is_put_back_reveals_the_same_bytes(
    fleet: SignedFleet, tmp_path: Path, bucket: int
) -> None:
    """Two noised copies of one sum would average out, and a backup, or a snapshot of the machine, makes two of them."""
    bench = Bench(fleet, tmp_path / "first")
    await bench.start()
    site = await (await PrivateRound(bench, 4, bucket=bucket, minimum_cohort=2).open()).answer()
    commit = site.commit()
    await bench.close()
    shutil.copytree(bench.state, tmp_path / "second")
    revealed = []
    for folder in ("first", "second"):
        again = Bench(fleet, tmp_path / folder)
        await again.start()
        again.commit(commit)
        await again.quiet()
        revealed.append(again.reveals()[0][1])
        await again.close()
    assert revealed[0] == revealed[1]
    if not bucket:
        noise = noise_in(site, revealed[0].words)
        assert np.abs(noise).max() > LEAST_SIGMA
        assert len(set(noise.tolist())) > 5


async def test_another_set_on_a_disk_that_was_put_back_gets_other_noise(fleet: SignedFleet, tmp_path: Path) -> None:
    """With the same noise their difference would be a device, exactly."""
    bench = Bench(fleet, tmp_path / "first")
    await bench.start()
    site = await (await PrivateRound(bench, 4, minimum_cohort=2).open()).answer()
    commits = {("d-0", "d-1", "d-2", "d-3"): "first", ("d-0", "d-1", "d-2"): "second"}
    signed = {names: site.commit(*names) for names in commits}
    await bench.close()
    shutil.copytree(bench.state, tmp_path / "second")
    found = []
    for names, folder in commits.items():
        again = Bench(fleet, tmp_path / folder)
        await again.start()
        again.commit(signed[names])
        await again.quiet()
        found.append(noise_in(site, again.reveals()[0][1].words, *names))
        await again.close()
    assert np.abs(found[0] - found[1]).max() > 100
