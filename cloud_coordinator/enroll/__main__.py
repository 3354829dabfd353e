"""``python -m fleetfed.cloud_coordinator.enroll``."""

from __future__ import annotations

from fleetfed.cloud_coordinator.enroll.cli import main

if __name__ == "__main__":
    main()
