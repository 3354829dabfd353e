"""Metrics: what every role counts, how it is exposed, and where it answers. No library is needed for it."""
