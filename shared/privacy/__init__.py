"""Differential privacy: noise, clipping and what they are worth. docs/privacy.md explains the guarantees."""
