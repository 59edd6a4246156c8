"""Rows of the paper's tables with one budget, to be fine-tuned from one base: `configs/tables.py:fastv_k2@small64`.

Rows are those of configs/ablations.py and configs/baselines.py, and `oft` and `openvla`. At `7b` a row is trained as
its config says. On the tabletop (the small variants) all parameters of every row are trained in the same way, so that
rows differ in nothing but the model; what a row has and the base has not begins at random.
`python -m semanticvla_jax.evaluate table` runs them.
"""

from configs import ablations, baselines, common, openvla, openvla_oft

ROWS = (*ablations.ROWS, *baselines.ROWS, "oft", "openvla")


def get_config(arg=None):
  row, variant = common.split(arg, ROWS)
  if row in ablations.ROWS:
    config = ablations.get_config(f"{row}@{variant}")
  elif row in baselines.ROWS:
    config = baselines.get_config(f"{row}@{variant}")
  else:
    config = (openvla_oft if row == "oft" else openvla).get_config(f"libero@{variant}")
  return config if variant == "7b" else tabletop(config)


def tabletop(config):
  """The same fine-tuning for each row."""
  config.lora = None
  config.trainable = ".*"
  config.model.update(scan=False, temperature=0.03, similarity_noise=0.03)  # as the base
  config.optim.update(name="muon", lr=1e-3, warmup_steps=30, decay_steps=500, end_lr=2e-5, b2=0.99, clip_norm=1.0)
  config.optim.update(drop_at=None, drop_to=None)
  config.data.update(
    mixture="tabletop_place",
    batch_size=32,
    prompt_length=32,
    instruction_length=24,
    keep_statistics=True,
    augment=False,
    crop_area=None,
    trajectory_end="pad",
  )
  config.train.update(steps=500, save_every=250, keep_last=1, log_every=50)
  if (config.model.decoder_pruner or {}).get("noise_steps") is not None:
    config.model.decoder_pruner["noise_steps"] = config.train.steps
  return config
