"""``python -m fleetfed.device`` is ``fleetfed-device``."""

from __future__ import annotations

import sys

from fleetfed.device.cli import main

sys.exit(main())
