"""SemanticVLA on Bridge V2: one view, proprioception of 7, five actions of 7 a chunk (at 5 Hz, a second).

    python -m semanticvla_jax.train --config=configs/bridge.py --workdir=… --config.data.dir=gs://…

Reads `bridge_orig`, the project website's version, by `standardize.BRIDGE`. The release names the platform and its five
actions a chunk but has no script for it: everything else is the LIBERO recipe.
"""

from configs import common


def get_config(arg=None):
  _, variant = common.split(arg, ("full",))
  config = common.get_config(variant)
  config.model.update(num_views=1, proprio_dim=7, action_dim=7, chunk=5)
  config.data.update(mixture="bridge_orig")
  return config
