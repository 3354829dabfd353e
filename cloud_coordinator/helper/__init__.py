"""The helper: a second holder of mask seeds, so that gateway and coordinator together read no update either.

It is run by somebody else than they, shares no code with the coordinator but `fleetfed.shared`, and believes nothing
that it cannot verify itself.
"""
