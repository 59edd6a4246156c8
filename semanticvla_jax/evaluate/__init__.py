"""Closed-loop evaluation: on the device or through a simulator's interface, with controls and a report."""
