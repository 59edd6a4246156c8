"""The `small` base from scratch on the tabletop's expert: batches made on the device, no dataset.

Two runs (`make pretrain`):

    python -m semanticvla_jax.train --config=configs/pretrain.py --workdir=runs/pretrain
    python -m semanticvla_jax.train --config=configs/pretrain.py:turn --workdir=runs/pretrain/turn \\
        --config.init_from=runs/pretrain/policy

The second sees more beginnings of episodes, where the gripper has still to turn. `:looks` is one run at 64 pixels whose
encoders are told shapes and edges too; docs/LOG.md has what it reaches. It is not the shipped base's recipe.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg=None):
  if arg not in (None, "", "turn", "looks"):
    raise ValueError(f"config argument: got {arg!r}, expected nothing, 'turn' or 'looks'.")
  config = common.get_config("small64" if arg == "looks" else "small", ratio=4)
  config.lora = None
  config.trainable = ".*"
  # Cues that point: from scratch there is no contrastive pre-training that would sharpen the similarities.
  config.model.update(scan=False, temperature=0.03, similarity_noise=0.03)
  config.optim.update(name="muon", lr=2e-3, warmup_steps=100, decay_steps=2_700, end_lr=2e-5, b2=0.99, clip_norm=1.0)
  # pick, place, spatial, goal, long, align: the last four stay unseen.
  config.data.update(
    mixture="expert", suites=(2, 3, 0, 0, 0, 0), batch_size=64, prompt_length=32, instruction_length=24,
    augment=False, crop_area=None,
  )
  config.train.update(steps=2_800, save_every=250, keep_last=2, log_every=50)
  with config.unlocked():
    config.train.grounding = ConfigDict(dict(alignment=0.1, naming=0.1, looks=0.0, displacement=0.2, aim=0.0, turn=0.1))
  if arg == "turn":
    config.seed = 8
    config.optim.update(lr=1e-3, warmup_steps=30, decay_steps=870)
    config.data.starts = 0.5
    config.train.steps = 900
  if arg == "looks":
    config.optim.update(lr=2.5e-3, decay_steps=2_500)
    config.data.starts = 0.5
    config.train.steps = 2_600
    config.train.grounding.update(looks=0.3, aim=0.5, turn=0.2)
  return config
