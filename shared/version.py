"""The version, which the package is built with, for presence, status and ``--version``.

Not read from the installed package's metadata: that would load an e-mail parser, 1.5 MB of a device's memory.
"""

from __future__ import annotations

VERSION = "0.1.0"


def software(role: str) -> str:
    """``fleetfed-ROLE VERSION``."""
    return f"fleetfed-{role} {VERSION}"
