"""PyTorch checkpoints in, parameter trees out: rules, one line a weight family, and the engine that applies them."""
