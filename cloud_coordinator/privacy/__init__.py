"""Differential privacy at the coordinator: settings, accounting, its own noise, and planning. See docs/privacy.md."""
