"""Bytes to frozen values and back, without I/O."""
