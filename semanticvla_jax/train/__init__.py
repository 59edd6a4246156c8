"""Sharded training: one compiled step over a mesh, a frozen and a trainable half, exact resume."""
