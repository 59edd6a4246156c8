"""A policy behind a network port: one core that owns the device, and a door for each protocol."""
