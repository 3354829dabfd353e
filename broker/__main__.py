"""``python -m fleetfed.broker``: see `fleetfed.broker.service`."""

from __future__ import annotations

import sys

from fleetfed.broker.service import main

if __name__ == "__main__":
    sys.exit(main())
