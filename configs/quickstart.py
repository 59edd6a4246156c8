"""LoRA fine-tuning of the shipped tabletop base on demonstrations it has not seen; what `make quickstart` trains.

python -m semanticvla_jax.train --config=configs/quickstart.py --workdir=runs/quickstart --config.init_from=DIR
"""

from configs import common


def get_config(arg=None):
  del arg
  config = common.get_config("small64", ratio=4)
  config.model.update(scan=False, temperature=0.03, similarity_noise=0.03)  # as the base
  config.optim.update(lr=3e-4, warmup_steps=50, decay_steps=450)
  config.data.update(
    mixture="tabletop",
    batch_size=32,
    prompt_length=32,
    instruction_length=24,
    keep_statistics=True,
    augment=False,
    crop_area=None,  # a crop would cost a tenth of 64 pixels
    trajectory_end="pad",  # of 25 steps the last seven are too many to leave out
  )
  config.train.update(steps=500, save_every=250, keep_last=2, log_every=20)
  return config
