"""The `small` base from scratch on the tabletop's expert (`make pretrain`): batches made on the device, no dataset.

    python -m semanticvla_jax.train --config=configs/pretrain.py --workdir=runs/pretrain
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg=None):
  del arg
  config = common.get_config("small", ratio=4)
  config.lora = None
  config.trainable = ".*"
  # Cues that point: from scratch there is no contrastive pre-training that would sharpen the similarities.
  config.model.update(scan=False, temperature=0.03, similarity_noise=0.03)
  config.optim.update(name="muon", lr=2.5e-3, warmup_steps=100, decay_steps=2_500, end_lr=2e-5, b2=0.99, clip_norm=1.0)
  # pick, place, spatial, goal, long, align: the last four stay unseen.
  config.data.update(
    mixture="expert", suites=(2, 3, 0, 0, 0, 0), batch_size=64, prompt_length=32, instruction_length=24,
    augment=False, crop_area=None, starts=0.5,  # half are beginnings, where the gripper has still to turn
  )
  config.train.update(steps=2_600, save_every=250, keep_last=2, log_every=50)
  with config.unlocked():
    config.train.grounding = ConfigDict(dict(alignment=0.1, naming=0.1, looks=0.3, displacement=0.2, aim=0.5, turn=0.2))
  return config
