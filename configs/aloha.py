"""SemanticVLA on a two-armed ALOHA: three views, 14 absolute joints, 25 actions a chunk, six action tokens a step."""

from configs import common


def get_config(arg=None):
  _, variant = common.split(arg, ("full",))
  config = common.get_config(variant)
  config.model.update(num_views=3, proprio_dim=14, action_dim=14, chunk=25)
  config.lora.update(rank=32, alpha=64.0)
  config.data.update(mixture="aloha", batch_size=64, normalisation="bounds")
  return config
