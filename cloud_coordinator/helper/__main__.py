"""``python -m fleetfed.cloud_coordinator.helper``."""

import sys

from fleetfed.cloud_coordinator.helper.cli import main

if __name__ == "__main__":
    sys.exit(main())
