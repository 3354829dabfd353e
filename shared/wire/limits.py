"""Every bound on bytes from a peer, in one place, with what it costs.

A size is checked against these before anything is parsed, decompressed or allocated.
"""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB

CHUNK_DATA: Final = 120 * KIB
"""Payload bytes of one chunk: on the throughput plateau of every broker measured, and under the 128 KiB that
the strictest managed broker allows once the frame is added."""

MAX_PACKET: Final = 256 * KIB
"""Largest MQTT packet that a broker of the fleet accepts."""

MAX_ID: Final = 48
"""Characters in an id of a fleet, a site or a member."""

MAX_SMALL_MESSAGE: Final = 64 * KIB
"""A signed message that must fit one packet: receipt, decline, commit of a small cohort, control, status."""

MAX_MANIFEST: Final = 120 * KIB
MAX_PLAN: Final = 120 * KIB

MAX_PARAMETERS: Final = 64 * 1024 * 1024
"""Trainable values in a model; the partial of such a model is 512 MiB, which a gateway maps from disk."""

MAX_UPDATE: Final = 64 * MIB
"""Compressed bytes of one device's update."""

MAX_PARTIAL: Final = 512 * MIB
"""Compressed bytes of one gateway's partial."""

MAX_PROPOSAL: Final = 64 * MIB
"""Compressed bytes of one proposal: about 100,000 contributors, or 14,000 whose keys are sealed with suite 3."""

MAX_HEAD: Final = 4608
"""Bytes of one head in a proposal: three boxes of the largest suite fit."""

MAX_COHORT: Final = 100_000
"""Contributors to one round at one gateway."""

MAX_BLOB: Final = 256 * MIB
"""A model file or patch, compressed or not."""

MAX_CHUNKS: Final = 8192
MAX_PATCH_CHAIN: Final = 16
"""Patches that one manifest may list."""

MAX_TENSORS: Final = 1024
MAX_REVOKED: Final = 100_000
MAX_ROWS: Final = 1024
"""Rows of a basis that updates are projected on."""
MAX_QUARANTINED: Final = 1000
"""Devices that a plan may set aside."""

MAX_TALLY: Final = 1 << 53
"""Largest count of anything in a census or a proposal: sums of a few still fit 64 bits, and a float holds it."""

MAX_MSGPACK_ITEMS: Final = 100_000
"""Elements of any one msgpack array or map; counted before the decoder allocates them."""
