"""The `small64` base from scratch on the tabletop's expert: batches made on the device, no dataset.

Three runs, each from the policy of the one before (`make pretrain`):

    python -m semanticvla_jax.train --config=configs/pretrain.py --workdir=runs/pretrain
    python -m semanticvla_jax.train --config=configs/pretrain.py:aim --workdir=runs/pretrain/aim \\
        --config.init_from=runs/pretrain/policy
    python -m semanticvla_jax.train --config=configs/pretrain.py:turn --workdir=runs/pretrain/turn \\
        --config.init_from=runs/pretrain/aim/policy

The first learns to reach, grasp and place what is meant, and never turns the gripper: most rotations are zero, and so
is the median that L1 asks for. The second trains the action states to predict the target cube's yaw, which the
encoders know by then; the third shows many strongly rotated cubes and counts rotations more.

A base with OpenVLA-OFT's parts, for rows of the paper's tables that prune nothing or inside the decoder, in two runs:

    python -m semanticvla_jax.train --config=configs/pretrain.py:dense --workdir=runs/pretrain_dense
    python -m semanticvla_jax.train --config=configs/pretrain.py:dense_end --workdir=runs/pretrain_dense/end \
        --config.init_from=runs/pretrain_dense/policy

Encoders and decoder begin as those of the shipped base, all else at random; the second run lets the rate fall and sees
more of how episodes end.
"""

from ml_collections import ConfigDict

from configs import common

RUNS = (None, "", "aim", "turn", "dense", "dense_end")


def get_config(arg=None):
  if arg not in RUNS:
    raise ValueError(
      f"config argument: got {arg!r}; expected nothing or one of {RUNS[2:]}; correct what follows the colon."
    )
  config = common.get_config("small64", ratio=4)
  config.lora = None
  config.trainable = ".*"
  # Cues that point: from scratch there is no contrastive pre-training that would sharpen the similarities.
  config.model.update(scan=False, temperature=0.03, similarity_noise=0.03)
  config.optim.update(name="muon", lr=2.5e-3, warmup_steps=100, decay_steps=2_500, end_lr=2e-5, b2=0.99, clip_norm=1.0)
  config.data.update(
    mixture="expert",
    batch_size=64,
    prompt_length=32,
    instruction_length=24,
    augment=False,
    crop_area=None,
  )
  config.train.update(steps=2_600, save_every=250, keep_last=2, log_every=50)
  weights = dict(alignment=0.1, naming=0.1, looks=0.3, displacement=0.2, aim=0.0, turn=0.2, rotation=0.0)
  with config.unlocked():  # fields of tabletop/training.py
    # pick, place, spatial, goal, long, align: the last four stay unseen.
    config.data.update(suites=(2, 3, 0, 0, 0, 0), starts=0.5, askew=0.0)
    config.train.grounding = ConfigDict(weights)
  if arg == "aim":
    config.seed = 8
    config.optim.update(lr=1e-3, warmup_steps=30, decay_steps=420)
    config.train.steps = 450
    config.train.grounding.aim = 0.5
  if arg == "turn":
    config.seed = 9
    config.optim.update(lr=2e-3, warmup_steps=30, decay_steps=1_170)
    config.data.askew = 0.5
    config.train.steps = 1_200
    config.train.grounding.update(looks=0.2, aim=0.3, rotation=2.0)
  if arg in ("dense", "dense_end"):
    config.model.update(common.OPENVLA | dict(coupler="single", mask="full"))
    config.data.update(batch_size=32, suites=(1, 3, 0, 0, 0, 0))
    config.optim.update(lr=2e-3, warmup_steps=60, decay_steps=5_000)
    config.train.steps = 1_000
    with config.unlocked():
      config.train.grounding.pointing = 1.0
    config.train.grounding.update(alignment=0.3, naming=0.3, looks=0.0, displacement=0.3, aim=0.1, rotation=0.5)
    config.init_from = "checkpoints/tabletop_small,matching"
  if arg == "dense_end":
    config.seed = 8
    config.optim.update(warmup_steps=30, decay_steps=970)
    config.data.starts = 0.1  # letting go is learned last, from the few states in which the object hangs over its bowl
    config.train.grounding.pointing = 0.3
    config.init_from = None
  return config
