"""Every row of the paper's ablations as data: `configs/ablations.py:table4_sa_sa@7b`.

A row is (ratio, {field: value}). Not here: the FastV and SliME lines of Table 5, which are other methods.
"""

from configs import common

NO_DENSE = {"model.dense_fuser": None, "model.vision_layer": "second_to_last"}
PER_DOF = {"model.coupler": "single"}

ROWS = {
  "full": (8, {}),
  # Table 4: pruner on SigLIP, pruner on DINOv2. FiLM goes with the SA-Pruner.
  "table4_id_id": (8, {"model.dino_pruner": "id", "model.film": ()}),
  "table4_sa_sa": (8, {"model.siglip_pruner": "sa", "model.film": ("dino", "siglip")}),
  "table4_sa_id": (8, {"model.siglip_pruner": "sa", "model.dino_pruner": "id", "model.film": ("siglip",)}),
  "table4_id_sa": (8, {}),
  # Table 5: sparsification ratio.
  "table5_r4": (4, {}),
  "table5_r8": (8, {}),
  "table5_r16": (16, {}),
  "table5_r32": (32, {}),
  # Table 6: fuser, coupler ("×" for the coupler is one token per degree of freedom).
  "table6_none": (8, NO_DENSE | {"model.sparse_fuser": "separate"} | PER_DOF),
  "table6_fuser": (8, PER_DOF),
  "table6_coupler": (8, NO_DENSE | {"model.sparse_fuser": "separate"}),
  "table6_both": (8, {}),
  # Parts of a fuser on their own.
  "no_dense_fuser": (8, NO_DENSE),
  "no_sparse_fuser": (8, {"model.sparse_fuser": "separate"}),
  # The paper's equations where the released code differs and the difference is cheap (PAPER.md).
  "paper_literal": (8, {"model.coupler": "paper", "model.aggregation_std": 0.0, "model.similarity_noise": 0.0}),
  # A careful reader's baseline: one encoder with both pruners.
  "siglip_only": (
    8,
    NO_DENSE
    | {
      "model.encoders": ("siglip",),
      "model.siglip_pruner": "sa+id",
      "model.film": ("siglip",),
    },
  ),
  "dino_only": (8, NO_DENSE | {"model.encoders": ("dino",)}),  # which cannot be pruned by the instruction
  # The number of patches follows the entropy of their scores, from 1/32 to 1/4. At the release's temperature every
  # picture would have nearly the largest.
  "dynamic": (4, {"model.temperature": 0.03}),
  # Controls: patches kept without looking at the instruction.
  "anchors_random": (8, {"model.anchor_rule": "random"}),
  "anchors_uniform": (8, {"model.anchor_rule": "uniform"}),
  "anchors_centre": (8, {"model.anchor_rule": "centre"}),
}


def get_config(arg=None):
  row, variant = common.split(arg, (*ROWS,))
  ratio, changes = ROWS[row]
  config = common.get_config(variant, ratio)
  config.update_from_flattened_dict(changes)
  if row == "dynamic":
    config.model.keep_least = max(common.PATCHES[variant] // 32, 1)
  return config
