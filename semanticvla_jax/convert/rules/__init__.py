"""Conversion rules: the engine that applies them, and one module for each family of weights."""
