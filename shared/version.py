"""The installed version, for presence, status and ``--version``."""

from __future__ import annotations

import importlib.metadata


def software(role: str) -> str:
    """``fleetfed-ROLE VERSION``."""
    return f"fleetfed-{role} {importlib.metadata.version('fleetfed')}"
