"""The rows of the paper's result tables, with the success rates that it gives; rows are those of configs/tables.py."""

from __future__ import annotations

from typing import NamedTuple

from semanticvla_jax.errors import refuse


class Entry(NamedTuple):
  """A line of a table.

  Attributes:
    row: of configs/tables.py.
    label: what the table calls it.
    paper: the paper's success rate in percent, mean of LIBERO's four suites; None where the paper has no such line.
  """

  row: str
  label: str
  paper: float | None = None


TABLES = {
  "2": (
    Entry("openvla", "OpenVLA (one view, one action)", 76.5),
    Entry("openvla_chunk", "OpenVLA, chunks, greedy"),
    Entry("pd_vla", "PD-VLA", 94.7),
    Entry("oft", "OpenVLA-OFT", 97.1),
    Entry("table5_r16", "SemanticVLA-Lite", 95.8),
    Entry("full", "SemanticVLA", 97.7),
  ),
  "4": (
    Entry("table4_id_id", "SigLIP: ID, DINOv2: ID", 91.9),
    Entry("table4_sa_sa", "SigLIP: SA, DINOv2: SA", 94.6),
    Entry("table4_sa_id", "SigLIP: SA, DINOv2: ID", 95.0),
    Entry("full", "SigLIP: ID, DINOv2: SA", 97.1),
    Entry("siglip_only", "SigLIP alone, both pruners"),
    Entry("dino_only", "DINOv2 alone, SA-Pruner"),
  ),
  "5": (
    Entry("oft", "dense (OpenVLA-OFT)"),
    Entry("table5_r4", "1/4 of the patches", 97.7),
    Entry("full", "1/8", 97.7),
    Entry("table5_r16", "1/16", 95.8),
    Entry("table5_r32", "1/32", 92.0),
    Entry("dynamic", "1/4 to 1/32 by entropy"),
    Entry("anchors_random", "1/8, random patches"),
    Entry("fastv_k2", "FastV, 1/8 from layer 2 on", 88.8),
    Entry("fastv_mean", "FastV by mean attention, 1/8"),
    Entry("prune_random", "random 1/8 from layer 2 on"),
    Entry("prune_uniform", "evenly spread 1/8 from layer 2 on"),
    Entry("slime", "SliME, resampler", 85.6),
    Entry("slime_router", "SliME, router", 85.6),
  ),
  "6": (
    Entry("table6_none", "no fuser, a token for each dimension", 93.6),
    Entry("table6_fuser", "fuser alone", 95.6),
    Entry("table6_coupler", "coupler alone", 94.1),
    Entry("full", "fuser and coupler", 97.1),
  ),
  "baselines": (  # that the paper does not compare with
    Entry("oft", "dense (OpenVLA-OFT)"),
    Entry("fastv_action", "attention of the actions, 1/8 from layer 2 on"),
    Entry("fastv_k3", "FastV, 1/8 from layer 3 on"),
    Entry("prune_random_k3", "random 1/8 from layer 3 on"),
    Entry("prune_uniform_k3", "evenly spread 1/8 from layer 3 on"),
    Entry("sparsevlm", "SparseVLM, 1/8 from layer 2 on"),
    Entry("vla_pruner_now", "VLA-Pruner without memory, 1/8 from layer 3 on"),
    Entry("vla_pruner", "VLA-Pruner, 1/8 from layer 3 on"),
    Entry("efficientvla_layers", "a third of the decoder's layers left out"),
    Entry("compressor_vla", "Compressor-VLA, 1/8"),
    Entry("lightvla", "LightVLA, room for 1/4"),
    Entry("cogvla", "CogVLA, 1/4"),
    Entry("fast", "OpenVLA with FAST's tokens, whole chunks alone"),
    Entry("fast_unconstrained", "the same, free to say no whole chunk"),
  ),
  "robustness": (
    Entry("oft", "OpenVLA-OFT"),
    Entry("full", "SemanticVLA"),
    Entry("anchors_random", "random patches"),
    Entry("fastv_k2", "FastV"),
  ),
}
FITTED = ("fast",)  # rows that speak action tokens fitted to the data
# Rows without training: they take the parameters of another row.
PARAMETERS_OF = {
  "pd_vla": "openvla_chunk",
  "fast_unconstrained": "fast",
  **dict.fromkeys(("fastv_k2", "fastv_k3", "fastv_mean", "fastv_action", "sparsevlm", "efficientvla_layers"), "oft"),
  **dict.fromkeys(("vla_pruner_now", "vla_pruner"), "oft"),
  **dict.fromkeys(("prune_random", "prune_uniform", "prune_random_k3", "prune_uniform_k3"), "oft"),
}


def entries(names: list[str]) -> list[Entry]:
  """The lines of tables, each row once, by the first label it has; rows that others take parameters of come first.

  Raises:
    ValueError: no such table.
  """
  if unknown := [name for name in names if name not in TABLES]:
    raise refuse("--table", ", ".join(unknown), f"some of {', '.join(TABLES)}", "choose among them")
  listed = {entry.row: entry for name in reversed(names) for entry in reversed(TABLES[name])}
  needed = [Entry(row, row) for row in {PARAMETERS_OF[row] for row in listed if row in PARAMETERS_OF} - {*listed}]
  found = [*needed, *reversed(listed.values())]
  return sorted(found, key=lambda entry: entry.row in PARAMETERS_OF)
