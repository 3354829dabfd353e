"""Metrics: what every role counts, how it is exposed, and where it answers. Only `exporter` needs a library."""
