"""What is measured, as data: rows of the paper's tables as model fields, sizes, training recipes, the paper's figures.

The same rows stand in configs/ for training; they are repeated here because a machine that only measures need not have
ml_collections. A test holds the two equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from semanticvla_jax.errors import refuse
from semanticvla_jax.models.config import VARIANTS

# About 250 million parameters: large enough that products dominate, small enough for two CPU cores.
MID = dict(
  image=224,
  patch=14,
  pairs=((1, 1), (5, 6), (9, 10)),
  dino=dict(width=384, depth=12, num_heads=6, mlp_dim=1536, registers=4, layer_scale=1e-5),
  siglip=dict(width=384, depth=12, num_heads=6, mlp_dim=1536),
  text=dict(vocab=32000, positions=64, width=384, depth=12, num_heads=6, mlp_dim=1536),
  llm=dict(vocab=32064, width=1024, depth=8, num_heads=8, mlp_dim=2752),
)
SIZES = {"tiny": VARIANTS["tiny"], "small": VARIANTS["small"], "mid": MID, "7b": VARIANTS["7b"]}


class Paper(NamedTuple):
  """Figures that the paper gives for a row, and where; None where it gives none.

  Attributes:
    table: "Table 5", say.
    tflops: 10¹² FLOPs of one forward pass with two views.
    hours: of training on eight A800; None where nothing is trained. latency: seconds on an A800.
  """

  table: str
  tflops: float
  hours: float | None
  latency: float


class Row(NamedTuple):
  """One model.

  Attributes:
    ratio: one of so many patches of each view is kept.
    fields: of a model config, where they differ from the released SemanticVLA's.
    recipe: name of its training recipe in RECIPES.
    paper: the paper's figures; None where it gives success rates alone.
    why: where our count of FLOPs and the paper's differ, in one line.
  """

  ratio: int = 8
  fields: Mapping[str, Any] = {}
  recipe: str = "semanticvla"
  paper: Paper | None = None
  why: str = "the paper gives success rates alone"


_OPENVLA = dict(dino_pruner=None, siglip_pruner=None, film=(), dense_fuser=None, vision_layer="second_to_last")
_DENSE = _OPENVLA | dict(coupler="single", mask="full")
_OFT = _DENSE | dict(scan=False)
_SA_BOTH = dict(dino_pruner="sa", siglip_pruner="sa", film=("dino", "siglip"))
_ROUTING = dict(least=0.15, most=0.85)
_NO_FUSER = dict(dense_fuser=None, vision_layer="second_to_last", sparse_fuser="separate")
_PER_DIMENSION = dict(coupler="single")
# Established by counting: with 20 prompt tokens, without attention's own products and without the text tower, ours are
# 8.43, 2.39, 1.95, 3.27 and 1.73 TFLOP where the paper has 8.45, 2.37, 1.93, 3.28 and 1.72.
_COUNTED = "ours has {}; without them it agrees with the paper to 1 % (column profiled)"
_SEEN = _COUNTED.format("a prompt longer than 20 tokens, attention's own products and the text tower")
_SLIME, _READING = Paper("Table 5", 2.71, 3.8, 0.089), "the paper's module is not public; this is one reading of it"
_OTHERS = "a method that the paper does not compare with; figures of its own paper are in docs/LOG.md"
_FASTV, _LAYER = Paper("Table 5", 2.71, None, 0.091), "the paper does not say behind which layer FastV prunes"
_VLA_PRUNER, _ABSENT = dict(block=3, score="mean+action"), "the paper has no such row"
_HISTORY = dict(history=dict(window=3, decay=0.8, block=15))

ROWS = {
  "openvla": Row(
    fields=_OPENVLA | dict(coupler=None, mask="causal", num_views=1, proprio_dim=None, chunk=1),
    recipe="openvla",
    paper=Paper("Table 2", 8.48, 11.7, 0.240),
    why="ours reads one view, as released, and decodes seven tokens with a cache; the paper's has both views",
  ),
  "oft": Row(
    fields=_DENSE,
    recipe="oft",
    paper=Paper("Table 2", 8.45, 12.3, 0.134),
    why=_COUNTED.format("a prompt longer than 20 tokens and attention's own products"),
  ),
  "full": Row(paper=Paper("Tables 2 and 5", 2.37, 3.9, 0.089), why=_SEEN),
  "lite": Row(ratio=16, paper=Paper("Tables 2 and 5", 1.93, 3.6, 0.087), why=_SEEN),
  "r4": Row(ratio=4, paper=Paper("Table 5", 3.28, 4.5, 0.093), why=_SEEN),
  "r32": Row(ratio=32, paper=Paper("Table 5", 1.72, 3.5, 0.086), why=_SEEN),
  # FastV as rows of OpenVLA-OFT; the paper does not say behind which layer it prunes. `model` adds how many it keeps.
  "fastv_k1": Row(fields=_OFT | dict(decoder_pruner=dict(block=1)), recipe="oft", paper=_FASTV, why=_LAYER),
  "fastv_k2": Row(fields=_OFT | dict(decoder_pruner=dict(block=2)), recipe="oft", paper=_FASTV, why=_LAYER),
  "fastv_k3": Row(fields=_OFT | dict(decoder_pruner=dict(block=3)), recipe="oft", paper=_FASTV, why=_LAYER),
  "vla_pruner": Row(fields=_OFT | dict(decoder_pruner=_VLA_PRUNER | _HISTORY), recipe="oft", why=_ABSENT),
  "vla_pruner_now": Row(fields=_OFT | dict(decoder_pruner=_VLA_PRUNER), recipe="oft", why=_ABSENT),
  # Two readings of SliME's row; `model` adds the number of tokens, 36 of 256.
  "slime": Row(fields=_DENSE | dict(compressor=dict(kind="resampler")), recipe="slime", paper=_SLIME, why=_READING),
  "slime_router": Row(fields=_DENSE | dict(compressor=dict(kind="router")), recipe="slime", paper=_SLIME, why=_READING),
  # Compressor-VLA, an eighth; `model` adds its numbers.
  "compressor_vla": Row(fields=_DENSE | dict(compressor=dict(kind="task_spatial")), recipe="slime", why=_OTHERS),
  # EfficientVLA's 10 of 32 layers; `model` says which.
  "efficientvla_layers": Row(fields=_OFT | dict(skip_layers=None), recipe="oft", why=_OTHERS),
  # LightVLA with room for a quarter.
  "lightvla": Row(
    fields=_DENSE | dict(decoder_pruner=dict(block=0, score="light", noise_steps=40_005)), recipe="oft", why=_OTHERS
  ),
  "cogvla": Row(
    ratio=4,
    fields=_DENSE | _SA_BOTH | dict(mask="block", sparse_fuser="mixture", scan=False, routing=_ROUTING),
    recipe="cogvla",
    why=_OTHERS,
  ),
  # Table 4 is named after the pruner of SigLIP, then of DINOv2. FiLM goes with the SA-Pruner.
  "table4_id_id": Row(fields=dict(dino_pruner="id", film=())),
  "table4_sa_sa": Row(fields=dict(siglip_pruner="sa", film=("dino", "siglip"))),
  "table4_sa_id": Row(fields=dict(siglip_pruner="sa", dino_pruner="id", film=("siglip",))),
  "table6_none": Row(fields=_NO_FUSER | _PER_DIMENSION),
  "table6_fuser": Row(fields=_PER_DIMENSION),
  "table6_coupler": Row(fields=_NO_FUSER),
}
# The lines of a table in its order. PD-VLA (Table 2) is another method and not here.
TABLES = {
  "Table 2": ("openvla", "oft", "lite", "full"),
  "Table 4": ("table4_id_id", "table4_sa_sa", "table4_sa_id", "full"),
  "Table 5": ("fastv_k2", "slime", "r4", "full", "lite", "r32"),
  "Table 6": ("table6_none", "table6_fuser", "table6_coupler", "full"),
}
PAPER_TRAINING_RATIO = 3.0  # OpenVLA-OFT's training cost against SemanticVLA's, by the paper's abstract


class Recipe(NamedTuple):
  """What of a model is trained; fields as those of a training config.

  Attributes:
    rank, alpha, targets: LoRA's, see models.lora.TARGETS.
    trainable: regular expression over the parameters that are trained in full; None for the adapters alone.
  """

  rank: int
  alpha: float
  targets: str
  trainable: str | None


_FILM = r"(dino|siglip)/Transformer/encoderblock_\d+/film/.*"
RECIPES = {
  "semanticvla": Recipe(
    64,
    128.0,
    "release",
    f"{_FILM}|(dino|siglip)_(sa|id)_pruner/.*|dense_fuser/.*|sparse_fuser/.*|proprio_projector/.*|coupler/.*",
  ),
  "oft": Recipe(32, 16.0, "all_linear", f"{_FILM}|proprio_projector/.*|coupler/.*"),
  "slime": Recipe(32, 16.0, "all_linear", f"{_FILM}|proprio_projector/.*|coupler/.*|compressor/.*"),
  "cogvla": Recipe(
    32,
    16.0,
    "all_linear",
    f"{_FILM}|proprio_projector/.*|coupler/.*|(dino|siglip)_sa_pruner/.*|sparse_fuser/.*|llm/layers_\\d+/router/.*",
  ),
  "openvla": Recipe(32, 16.0, "all_linear", None),
}
# AdamW as configs/common.py has it.
OPTIMIZER = dict(
  name="adamw",
  lr=5e-4,
  warmup_steps=2000,
  decay_steps=80_000,
  end_lr=1e-5,
  b1=0.9,
  b2=0.999,
  eps=1e-8,
  weight_decay=0.01,
  drop_at=None,
  drop_to=None,
  clip_norm=None,
  ema=None,
)


def row(name: str) -> Row:
  """A row by name. Raises ValueError for one that does not exist."""
  if name not in ROWS:
    raise refuse("--row", repr(name), f"one of {', '.join(ROWS)}", "choose one of them")
  return ROWS[name]


def model(name: str, size: str, dtype: str = "float32", **fields: Any) -> dict[str, Any]:
  """The model config of a row at a size of SIZES, for `models.semanticvla.build`.

  Raises:
    ValueError: a row or size that does not exist.
  """
  chosen = row(name)
  if size not in SIZES:
    raise refuse("--size", repr(size), f"one of {', '.join(SIZES)}", "choose one of them")
  sizes = SIZES[size]
  variant = size if size in VARIANTS else sizes
  grid = sizes["image"] // sizes["patch"]
  keep = max(grid**2 // chosen.ratio, 1)
  made = {"variant": variant, "keep": keep, **chosen.fields, "dtype": dtype, **fields}
  if pruner := made.get("decoder_pruner"):
    depth = sizes["llm"]["depth"]
    block = min(pruner["block"], depth - 1)
    made["decoder_pruner"] = pruner | {"block": block, "keep": keep * (2 if pruner.get("score") == "light" else 1)}
    if history := pruner.get("history"):
      own = max(history["block"] * depth // VARIANTS["7b"]["llm"]["depth"], block - 1)
      made["decoder_pruner"]["history"] = history | {"block": own}
  if compressor := made.get("compressor"):
    made["compressor"] = _compressor_numbers(compressor["kind"], grid, keep) | compressor
  if made.get("skip_layers", ()) is None:
    depth = sizes["llm"]["depth"]
    made["skip_layers"] = tuple(range(depth - 2 * max(round(depth * 10 / 32), 1), depth, 2))
  return made


def _compressor_numbers(kind: str, grid: int, keep: int) -> dict[str, int]:
  """The numbers of a compressor for grid × grid patches, of which the row keeps `keep`."""
  side, window = round(grid * 6 / 16), 3 if grid % 4 else 4
  return {
    "resampler": {"side": side},
    "router": {"keep": side**2},
    "task_spatial": {"queries": max(keep - (grid // window) ** 2, 2), "window": window},
  }[kind]
