"""SemanticVLA (AAAI 2026) in JAX and Flax: `Policy` acts, `build` and `VARIANTS` make models; loaded on first use."""

import importlib
from typing import Any

__version__ = "0.1.0"
_PUBLIC = {
  "Policy": "semanticvla_jax.policy",
  "build": "semanticvla_jax.models.semanticvla",
  "VARIANTS": "semanticvla_jax.models.semanticvla",
}


def __getattr__(name: str) -> Any:
  if name not in _PUBLIC:
    raise AttributeError(f"module 'semanticvla_jax' has no attribute {name!r}; it has {', '.join(_PUBLIC)}")
  return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
  return [*_PUBLIC, "__version__"]
