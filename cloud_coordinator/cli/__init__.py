"""The operator's command line, `fleetfed`.

Exit codes::

    0  done
    1  it failed; the message says why
    2  a wrong option or configuration file
    3  a store or a key folder is missing or damaged
    4  no answer: no connection to the broker, or the coordinator did not answer in time
    5  the coordinator refused the command
    130  interrupted

Each group of commands is a module of its own and is imported when it is used.
"""

from __future__ import annotations

from fleetfed.cloud_coordinator.cli.app import cli, main

__all__ = ["cli", "main"]
