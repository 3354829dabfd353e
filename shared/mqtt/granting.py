"""What may be missed while a broker takes its time to grant subscriptions.

NATS (2.10 and newer) looks up what it retains, and only then makes the subscriptions, one consumer after another in the
whole cluster: seconds, while the machines are busy. What is retained in between comes neither as a copy nor live, and a
member that so missed the trust metadata would refuse every plan. Whoever asks once more is given the copies again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

SLOW: Final = 0.5
"""Seconds until a grant counts as slow. Most grant at once, and asking again brings copies of what came already."""


def ask_again(filters: Iterable[str], *, seconds: float) -> list[str]:
    """Those of ``filters``, granted after ``seconds``, to subscribe to once more.

    Filters with wildcards are left out: what members say there they say again.
    """
    if seconds < SLOW:
        return []
    return [each for each in filters if not {"+", "#"}.intersection(each)]
