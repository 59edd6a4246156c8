"""Other people's ways to prune visual tokens, as rows on OpenVLA-OFT: `configs/baselines.py:fastv_k3@7b`.

A row is (ratio, {field of the decoder pruner: value}): each view keeps 1/ratio of its patches from layer `block` of the
language model on. Nothing of it is trained, so a row is meant for a policy trained as `configs/openvla_oft.py`; trained
from the start it is a model that prunes while it learns. What is public of each method, and which reading of it ours
is, stands in PAPER.md.
"""

from configs import common, openvla_oft

ROWS = {
  "fastv_k1": (8, dict(block=1)),
  "fastv_k2": (8, dict(block=2)),  # FastV's default
  "fastv_k3": (8, dict(block=3)),
  "fastv_mean": (8, dict(block=2, score="mean")),  # the score that FastV's paper describes
  "fastv_stop": (8, dict(block=2, score="stop")),
  "fastv_action": (8, dict(block=2, score="action")),
  # Controls: what a score is worth.
  "prune_random": (8, dict(block=2, score="random")),
  "prune_uniform": (8, dict(block=2, score="uniform")),
  "prune_centre": (8, dict(block=2, score="centre")),
}


def get_config(arg=None):
  row, variant = common.split(arg, (*ROWS,))
  ratio, fields = ROWS[row]
  config = openvla_oft.get_config(f"libero@{variant}")
  if variant == "tiny":  # which has two layers
    fields = fields | dict(block=1)
  config.model.scan = False  # layers that see different tokens are no loop
  config.model.decoder_pruner = dict(keep=common.PATCHES[variant] // ratio, **fields)
  return config
