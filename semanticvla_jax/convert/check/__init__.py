"""Comparing checkpoints and models: against PyTorch, against stored outputs, against each other."""
