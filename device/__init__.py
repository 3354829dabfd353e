"""The device agent: trains on local data and publishes signed updates."""
