"""SemanticVLA on your own robot: everything that the DatasetSpec says is left to it.

    python -m semanticvla_jax.train --config=configs/robot.py:@7b --config.data.specs=my_robot.py:SPEC \
        --config.data.dir=DIR --config.init_from=policies/base,policies/siglip --workdir=runs/mine

-1 and None are the spec's: number of views, widths, chunk, groups of action dimensions, normalization, dataset.
"""

from ml_collections.config_dict import placeholder

from configs import common


def get_config(arg=None):
  _, variant = common.split(arg, ("full",))
  config = common.get_config(variant)
  config.model.update(num_views=-1, proprio_dim=-1, action_dim=-1, chunk=-1)
  config.lora.update(rank=32, alpha=64.0)
  with config.unlocked(), config.ignore_type():
    config.data.update(mixture=placeholder(str), normalisation=placeholder(str), batch_size=64)
  return config
