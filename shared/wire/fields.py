"""Types that the bodies of messages share: an annotation is a bound that `codec.decode` enforces."""

from __future__ import annotations

from typing import Annotated, Final

from fleetfed.shared.wire import limits
from fleetfed.shared.wire.codec import Length, Range

# An integer: as a float it would be 2^63, which databases refuse.
_U63: Final = 2**63 - 1

Bytes16 = Annotated[bytes, Length(16, 16)]
Bytes32 = Annotated[bytes, Length(32, 32)]
Id = Annotated[str, Length(1, limits.MAX_ID)]
Name = Annotated[str, Length(1, 100)]
Text = Annotated[str, Length(0, 2000)]
Count = Annotated[int, Range(0, _U63)]
Positive = Annotated[int, Range(1, _U63)]
Millis = Annotated[int, Range(0, _U63)]
Tally = Annotated[int, Range(0, limits.MAX_TALLY)]
Label = Annotated[str, Length(1, 64)]
Fraction = Annotated[float, Range(0.0, 1.0)]
