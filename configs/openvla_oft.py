"""OpenVLA-OFT: the same code without pruners and fusers, 56 action tokens, a fully bidirectional mask and one head.

`:libero` (two views), `:film` (OFT+: FiLM on both encoders), `:aloha` (OFT+ on two arms, three views).
"""

from configs import common


def get_config(arg=None):
  mode, variant = common.split(arg, ("libero", "film", "aloha"))
  config = common.get_config(variant)
  config.model.update(common.OPENVLA | dict(coupler="single", mask="full"))
  if mode != "libero":
    config.model.film = ("dino", "siglip")
  if mode == "aloha":
    config.model.update(num_views=3, proprio_dim=14, action_dim=14, chunk=25)
    config.data.update(mixture="aloha", normalisation="bounds")
  config.lora.update(rank=32, alpha=16.0, targets="all_linear")
  config.trainable = r"(dino|siglip)/Transformer/encoderblock_\d+/film/.*|proprio_projector/.*|coupler/.*"
  # lr 5e-4, divided by ten at 100 000 steps (50 000 on ALOHA); no warm-up.
  drop = 50_000 if mode == "aloha" else 100_000
  config.optim.update(warmup_steps=0, decay_steps=None, drop_at=drop, drop_to=0.1)
  config.data.batch_size = 32 if mode == "aloha" else 64
  config.train.steps = 100_005 if mode == "aloha" else 150_005
  return config
