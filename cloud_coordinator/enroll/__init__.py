"""Enrolment: a role of its own, which certifies devices for one-time tokens and nobody else for anything.

Neither a gateway nor the coordinator can make a device: only this service's key and the offline authority's can, and
every certificate stands in a log that anyone can audit. `docs/enrolment.md` tells the operator's story.
"""
