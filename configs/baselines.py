"""Other people's ways to have fewer visual tokens, as rows on OpenVLA-OFT: `configs/baselines.py:fastv_k3@7b`.

Rows of DECODER keep 1/8 of each view's patches from layer `block` of the language model on. Nothing of that is trained,
so a row is meant for a policy trained as `configs/openvla_oft.py`; trained from the start it is a model that prunes
while it learns. Rows of COMPRESSOR have an additional module in front of the language model and are trained. Rows of
SPOKEN are OpenVLA with two views and eight actions a query, a token for each of their 56 numbers: the three differ in
how the tokens are decoded, not in training. Rows of FAST are the same model with FAST's tokens, fitted to the data:
`python -m semanticvla_jax.data fit-tokenizer`, then `--config.data.action_tokens=FILE`. PAPER.md says what is public of
each method, and which reading ours is.
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
}
COMPRESSOR = ("slime", "slime_router")
SPOKEN = {"openvla_chunk": "greedy", "pd_vla": "jacobi", "pd_vla_bidirectional": "jacobi_bidirectional"}
FAST = {"fast": "constrained", "fast_unconstrained": "greedy"}
ROWS = (*DECODER, *COMPRESSOR, *SPOKEN, *FAST)
HISTORY = {"tiny": 0, "small": 2, "small64": 2, "7b": 15}  # the layer whose attention vla_pruner remembers
SIDES = {"tiny": 3, "small": 2, "small64": 3, "7b": 6}  # of SliME's grid: 36 tokens a view at 7b, about an eighth


def get_config(arg=None):
  row, variant = common.split(arg, ROWS)
  if row in SPOKEN or row in FAST:
    config = openvla.get_config(f"libero@{variant}")
    codec = "fast" if row in FAST else "bins"
    config.model.update(chunk=8, num_views=2, codec=codec, decoding=(SPOKEN | FAST)[row])
    return config
  config = openvla_oft.get_config(f"libero@{variant}")
  if row in DECODER:
    fields = DECODER[row] | (dict(block=1) if variant == "tiny" else {})  # which has two layers
    config.model.scan = False  # layers that see different tokens cannot run as one loop
    if "history" in fields:
      fields["history"] = fields["history"] | dict(block=HISTORY[variant])
    config.model.decoder_pruner = dict(keep=common.PATCHES[variant] // 8, **fields)
  else:
    side = SIDES[variant]
    config.model.compressor = dict(kind="resampler", side=side) if row == "slime" else dict(kind="router", keep=side**2)
    config.trainable += "|compressor/.*"
  return config
