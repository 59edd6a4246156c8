"""SemanticVLA (AAAI 2026, arXiv 2511.10518) in JAX and Flax: models, data, training, conversion, evaluation."""

__version__ = "0.1.0"
