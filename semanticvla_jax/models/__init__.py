"""The network: pure functions of arrays (jax, flax, einops); no files, no config, no tensorflow."""
