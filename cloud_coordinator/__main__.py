"""``python -m fleetfed.cloud_coordinator`` is `fleetfed`."""

from __future__ import annotations

from fleetfed.cloud_coordinator.cli import main

if __name__ == "__main__":
    main()
