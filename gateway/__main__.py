"""``python -m fleetfed.gateway``."""

import sys

from fleetfed.gateway.cli import main

if __name__ == "__main__":
    sys.exit(main())
