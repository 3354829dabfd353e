"""A whole fleet on one machine: keys, broker, coordinator, gateways and devices, each a real process.

::

    partition.py    who gets which examples
    sources.py      the examples themselves
    topology.py     sites, gateways and devices as a tree
    layout.py       keys, access list and settings of everything, as files
    processes.py    starts, watches and stops operating-system processes
    live.py         the table that grows by a line per round
    report.py       what it cost, and a plot of it
    run.py          one demo from beginning to end
"""
