"""A model from scratch on LIBERO's scripted demonstrations (libero_object_no_noops, 10 tasks × 30 episodes).

    python -m semanticvla_jax.train --config=configs/libero_scripted.py --workdir=runs/scripted --config.data.dir=data

Between `small` and what a GPU would want: at 96 pixels an object of libero_object, 12 to 25 of 256 pixels wide, is
about a patch of 8 pixels; twice `small`'s widths and one block more, for ten objects on one floor are to be told apart
and nothing is pre-trained. `:spatial` and `:goal` learn the datasets of those suites. With `@small64` behind the suite
it is `small` at 64 pixels, what two CPU cores train in half an hour; for libero_spatial and libero_goal with room for
longer sentences.
"""

from ml_collections import ConfigDict

from configs import common

SUITES = {"object": "libero_object_no_noops", "spatial": "libero_spatial_no_noops", "goal": "libero_goal_no_noops"}
WORDS = 32  # of an instruction: libero_spatial's longest has 26
ROW = dict(
  image=96,
  patch=8,
  pairs=((1, 1), (2, 2), (3, 3)),
  dino=dict(width=128, depth=5, num_heads=4, mlp_dim=256, registers=1, layer_scale=1.0, position_init="sincos"),
  siglip=dict(width=128, depth=4, num_heads=4, mlp_dim=256, position_init="sincos"),
  text=dict(vocab=512, positions=WORDS, width=128, depth=1, num_heads=4, mlp_dim=256),
  llm=dict(vocab=512, width=192, depth=4, num_heads=6, mlp_dim=512),
)
SMALL64 = dict(
  image=64,
  patch=8,
  pairs=((0, 0), (1, 1), (2, 2)),
  dino=dict(width=64, depth=4, num_heads=2, mlp_dim=128, registers=1, layer_scale=1.0, position_init="sincos"),
  siglip=dict(width=64, depth=3, num_heads=2, mlp_dim=128, position_init="sincos"),
  text=dict(vocab=512, positions=WORDS, width=64, depth=1, num_heads=2, mlp_dim=128),
  llm=dict(vocab=512, width=96, depth=4, num_heads=3, mlp_dim=256),
)
SIZES = {"object": "small64", "spatial": SMALL64, "goal": SMALL64}  # at 64 pixels
VARIANTS = {suite: ROW for suite in SUITES} | {f"{suite}@small64": variant for suite, variant in SIZES.items()}


def get_config(arg=None):
  arg = arg or "object"
  if arg not in VARIANTS:
    raise ValueError(f"config argument: got {arg!r}; expected one of {(*VARIANTS,)}; correct what follows the colon.")
  suite, _, smaller = arg.partition("@")
  config = common.get_config(smaller or "small", ratio=4)
  config.lora = None
  config.trainable = ".*"
  # Cues that point, as in pretrain.py.
  config.model.update(scan=False, temperature=0.03, similarity_noise=0.03)
  config.optim.update(name="muon", lr=2e-3, warmup_steps=200, decay_steps=12_000, end_lr=2e-5, b2=0.99, clip_norm=1.0)
  # 40,000 frames: crops and colors keep it from learning them by heart. Every demonstration begins in one pose and
  # follows one path; the benchmark's first states lie a centimetre beside it.
  config.data.update(mixture=SUITES[suite], batch_size=64, prompt_length=48, jitter=(0.015, 0.02))
  config.train.update(steps=12_200, save_every=1_000, keep_last=2, log_every=50)
  if smaller:
    config.optim.update(warmup_steps=100, decay_steps=1_500)
    # An object is four pixels wide. The last frames, where the gripper opens, begin chunks too.
    config.data.update(augment=False, crop_area=None, trajectory_end="pad")
    config.train.update(steps=1_600, save_every=400)
  else:
    config.model.keep = 36  # of 144 patches a view
  if isinstance(VARIANTS[arg], dict):
    with config.unlocked(), config.model.ignore_type():
      config.model.variant = ConfigDict(VARIANTS[arg])
    config.data.instruction_length = WORDS
  return config
