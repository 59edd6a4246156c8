"""Other people's ways to have fewer visual tokens, as rows on OpenVLA-OFT: `configs/baselines.py:fastv_k3@7b`.

Rows of DECODER keep 1/8 of each view's patches from layer `block` of the language model on; `efficientvla_layers`
leaves some of its layers out. Nothing of that is trained, so a row is meant for a policy trained as
`configs/openvla_oft.py`; trained from the start it is a model that prunes while it learns. Rows of COMPRESSOR have an
additional module in front of the language model and are trained. `lightvla` has no parameters to add, and is trained
from a policy that `configs/openvla_oft.py` has finished. Rows of SPOKEN are OpenVLA with two views and eight
actions a query, a token for each of their 56 numbers: the three differ in how the tokens are decoded, not in training.
Rows of FAST are the same model with FAST's tokens, fitted to the data: `python -m semanticvla_jax.data fit-tokenizer`,
then `--config.data.action_tokens=FILE`. PAPER.md says what is public of each method, and which reading ours is.
"""

from configs import common, openvla, openvla_oft

DECODER = {
  "fastv_k1": dict(block=1),
  "fastv_k2": dict(block=2),  # FastV's default
  "fastv_k3": dict(block=3),
  "fastv_mean": dict(block=2, score="mean"),  # the score that FastV's paper describes
  "fastv_stop": dict(block=2, score="stop"),
  "fastv_action": dict(block=2, score="action"),
  "sparsevlm": dict(block=2, score="raters"),
  "vla_pruner": dict(block=3, score="mean+action", history=dict(window=3, decay=0.8)),
  "vla_pruner_now": dict(block=3, score="mean+action"),  # without memory: this query's own actions
  # Controls: what a score is worth.
  "prune_random": dict(block=2, score="random"),
  "prune_uniform": dict(block=2, score="uniform"),
  "prune_centre": dict(block=2, score="centre"),
  "prune_random_k3": dict(block=3, score="random"),
  "prune_uniform_k3": dict(block=3, score="uniform"),
}
COMPRESSOR = ("slime", "slime_router", "compressor_vla")
LIGHT_STEPS = 40_005  # of LightVLA's training, over which its noise falls to 0
SPOKEN = {"openvla_chunk": "greedy", "pd_vla": "jacobi", "pd_vla_bidirectional": "jacobi_bidirectional"}
FAST = {"fast": "constrained", "fast_unconstrained": "greedy"}
HISTORY = {"tiny": 0, "small": 2, "small64": 2, "7b": 15}  # the layer whose attention vla_pruner remembers
# EfficientVLA leaves out 10 of 32 layers. Which ones depends on the policy: these, every second of the last, are a
# placeholder, `evaluate doctor --model` measures a policy's own.
SKIPPED = {"tiny": (0,), "small": (2,), "small64": (2,), "7b": tuple(range(12, 32, 2))}
ROWS = (*DECODER, *COMPRESSOR, "efficientvla_layers", "lightvla", "cogvla", *SPOKEN, *FAST)
TASK_SPATIAL = {"tiny": (4, 4), "small": (2, 3), "small64": (4, 4), "7b": (16, 4)}  # queries, window: 16 + 16 at 7b
SIDES = {"tiny": 3, "small": 2, "small64": 3, "7b": 6}  # of SliME's grid: 36 tokens a view at 7b, about an eighth


def get_config(arg=None):
  row, variant = common.split(arg, ROWS)
  if row in SPOKEN or row in FAST:
    config = openvla.get_config(f"libero@{variant}")
    codec = "fast" if row in FAST else "bins"
    config.model.update(chunk=8, num_views=2, codec=codec, decoding=(SPOKEN | FAST)[row])
    return config
  if row == "cogvla":
    return _cogvla(variant)
  config = openvla_oft.get_config(f"libero@{variant}")
  if row in DECODER:
    fields = DECODER[row] | (dict(block=1) if variant == "tiny" else {})  # which has two layers
    config.model.scan = False  # layers that see different tokens cannot run as one loop
    if "history" in fields:
      fields["history"] = fields["history"] | dict(block=HISTORY[variant])
    config.model.decoder_pruner = dict(keep=common.PATCHES[variant] // 8, **fields)
  elif row == "efficientvla_layers":
    config.model.update(scan=False, skip_layers=SKIPPED[variant])
  elif row == "lightvla":
    places = common.PATCHES[variant] // 4  # a view; about 78 of 512 patches are kept on LIBERO
    config.model.decoder_pruner = dict(block=0, keep=places, score="light", noise_steps=LIGHT_STEPS)
    config.optim.drop_at, config.train.steps = 30_000, LIGHT_STEPS
  else:
    side, (queries, window) = SIDES[variant], TASK_SPATIAL[variant]
    config.model.compressor = {
      "slime": dict(kind="resampler", side=side),
      "slime_router": dict(kind="router", keep=side**2),
      "compressor_vla": dict(kind="task_spatial", queries=queries, window=window),
    }[row]
    config.trainable += "|compressor/.*"
  return config


def _cogvla(variant):
  """Aggregation tokens in both encoders, whose projections are mixed, and routed decoder layers."""
  config = openvla_oft.get_config(f"film@{variant}")
  config.model.update(dino_pruner="sa", siglip_pruner="sa", keep=common.PATCHES[variant] // 4, sparse_fuser="mixture")
  config.model.update(mask="block", scan=False, routing=dict(least=0.15, most=0.85))
  config.trainable += r"|(dino|siglip)_sa_pruner/.*|sparse_fuser/.*|llm/layers_\d+/router/.*"
  config.train.steps = 80_005
  return config
