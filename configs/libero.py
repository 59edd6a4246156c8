"""SemanticVLA on LIBERO: `:full` (8×, the paper's main row), `:lite` (16×), `:r4`, `:r32`; each `@tiny|small|7b`.

python -m semanticvla_jax.train --config=configs/libero.py:lite@7b --workdir=…
"""

from configs import common

RATIOS = {"full": 8, "lite": 16, "r4": 4, "r32": 32}


def get_config(arg=None):
  mode, variant = common.split(arg, (*RATIOS,))
  return common.get_config(variant, RATIOS[mode])
