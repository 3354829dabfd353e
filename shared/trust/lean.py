"""Loads TUF's reader for a device: without `cryptography`, which securesystemslib would take where it finds it.

We check Ed25519 through libsodium (`fleetfed.shared.trust.tuf`), so those 7 MB of memory would buy nothing.
"""

from __future__ import annotations

import importlib
import sys

_UNWANTED = "cryptography"


def load() -> None:
    """Load securesystemslib, unless that has happened; whoever has `cryptography` already keeps it."""
    if _UNWANTED in sys.modules:
        return
    # An entry of None is how Python says that a module cannot be imported.
    sys.modules[_UNWANTED] = None  # type: ignore[assignment]
    try:
        importlib.import_module("securesystemslib.signer")
    finally:
        del sys.modules[_UNWANTED]
