"""Demonstrations as RLDS datasets on disk."""
