"""The original OpenVLA: one view, no proprioception, causal, seven greedy tokens of 256 bins a query.

`:base` converts openvla-7b to start SemanticVLA from, which takes the last block of each encoder too (README).
"""

from configs import common


def get_config(arg=None):
  mode, variant = common.split(arg, ("libero", "base"))
  config = common.get_config(variant)
  own = dict(coupler=None, mask="causal", num_views=1, proprio_dim=None, chunk=1)
  config.model.update(common.OPENVLA | own)
  if mode == "base":
    config.model.vision_layer = "last"
  config.lora.update(rank=32, alpha=16.0, targets="all_linear")
  config.trainable = None
  config.optim.update(warmup_steps=0, decay_steps=None)
  config.data.update(mixture="libero_spatial_no_noops", batch_size=16)
  return config
