"""Couplers compared on suite `align` of the tabletop, where a peg has to be carried and turned at once.

    python -m semanticvla_jax.train --config=configs/coupling.py:grouped --workdir=runs/align/grouped \\
        --config.init_from=checkpoints/tabletop_small

and the same with `:single` and `:one`. Batches are the expert's, made on the device, and the same for each, as are
steps, optimizer and auxiliary losses. No group has a name of the base's, so that every row starts with new heads.
"""

from configs import pretrain

ROWS = {
  "grouped": {"model.groups": (("translation", (0, 1, 2)), ("rotation", (3, 4, 5)), ("gripper", (6,)))},
  "single": {"model.coupler": "single"},  # a token for each of the seven dimensions, one head
  "one": {"model.groups": (("all", (0, 1, 2, 3, 4, 5, 6)),)},  # one token, one head
}


def get_config(arg=None):
  arg = arg or "grouped"
  if arg not in ROWS:
    raise ValueError(
      f"config argument: got {arg!r}; expected one of {(*ROWS,)}; write it behind the colon: configs/coupling.py:one."
    )
  config = pretrain.get_config("turn")
  config.seed = 10
  config.optim.update(lr=2e-3, warmup_steps=30, decay_steps=470)
  config.data.update(batch_size=32, suites=(0, 0, 0, 0, 0, 1), askew=0.0)
  config.train.update(steps=500, save_every=250)
  config.train.grounding.aim = 0.0  # of cubes, which suite `align` does not name
  config.update_from_flattened_dict(ROWS[arg])
  return config
