"""What the configs share: the released LIBERO recipe as one locked ConfigDict, and how `mode@variant` is read.

Fields mirror the code that reads them: `model` is semanticvla.DEFAULTS, `lora` is LoRA's attributes, and so on. Nothing
here imports the package.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

PATCHES = {"tiny": 64, "small": 36, "small64": 64, "7b": 256}  # per view, (image / patch)² of the variant
WORDS = {"tiny": 32, "small": 24, "small64": 24, "7b": 64}  # of an instruction: positions of the variant's text tower


# OpenVLA and OpenVLA-OFT as values of `model`: no pruners, no fusers, no FiLM, the second-to-last block's patches.
OPENVLA = dict(dino_pruner=None, siglip_pruner=None, film=(), dense_fuser=None, vision_layer="second_to_last")


def split(arg: str | None, modes: tuple[str, ...]) -> tuple[str, str]:
  """ "lite@tiny" → ("lite", "tiny"); the first mode and 7b are the defaults."""
  mode, _, variant = (arg or "").partition("@")
  mode, variant = mode or modes[0], variant or "7b"
  if mode not in modes or variant not in PATCHES:
    raise ValueError(
      f"config argument: got {arg!r}; expected MODE@VARIANT with MODE one of {modes} and VARIANT one of {(*PATCHES,)}; "
      "correct what follows the colon."
    )
  return mode, variant


def get_config(variant: str = "7b", ratio: int = 8) -> ConfigDict:
  """SemanticVLA as released for LIBERO, keeping 1/ratio of each view's patches."""
  config = ConfigDict()
  config.seed = 7
  config.model = _model(variant, ratio)
  # A policy folder to start from; several with commas, where later ones give what the first lacks. Frozen parameters
  # that none has are an error, unless "random" is in the list. With "matching" in it, what of a base does not fit this
  # model by name and shape is left out.
  config.init_from = placeholder(str)
  config.lora = ConfigDict(dict(rank=64, alpha=128.0, targets="release"))
  # Trained in full beside the adapters; everything else is frozen (and kept in bfloat16 at 7b).
  config.trainable = (
    r"(dino|siglip)/Transformer/encoderblock_\d+/film/.*|(dino|siglip)_(sa|id)_pruner/.*|dense_fuser/.*"
    r"|sparse_fuser/.*|proprio_projector/.*|coupler/.*"
  )
  config.frozen_dtype = placeholder(str)  # of frozen parameters; None: float32, as the trainable ones
  if variant == "7b":
    config.frozen_dtype = "bfloat16"
  config.optim = _optim()
  config.data = _data(variant)
  config.train = _train()
  # Sizes; one -1 takes what is left. overrides: (regular expression over parameter paths, (axis or None, …)), …
  # Parameters of fewer numbers than split_above are copied over fsdp.
  config.mesh = ConfigDict(dict(replica=1, data=1, fsdp=-1, tensor=1, overrides=(), split_above=2**16))
  return config.lock()


def _model(variant: str, ratio: int) -> ConfigDict:
  model = ConfigDict(
    dict(
      variant=variant,
      encoders=("dino", "siglip"),
      dino_pruner="sa",
      siglip_pruner="id",
      film=("dino",),
      film_pool="words",
      keep=PATCHES[variant] // ratio,
      keep_least=placeholder(int),  # patches that an ID-Pruner shows at least; None: all `keep`
      cues=5,
      temperature=1.0,
      cue_temperature=placeholder(float),  # None: as `temperature`
      cue_pool="mean",
      cue_stop=(),  # ids of instruction tokens that cannot be cues
      similarity_noise=0.1,
      anchor_rule="similarity",
      aggregation_std=1.0,
      dense_fuser="variant",
      sparse_fuser="joint",
      vision_layer="last",
      siglip_gelu="erf",
      num_views=2,
      proprio_dim=8,
      optional_views=(),  # numbers of the views that may be missing
      action_dim=7,
      groups=placeholder(object),  # of action dimensions; None: arms of seven
      chunk=8,
      coupler="grouped",
      codec="bins",  # of coupler=None; "fast" with data.action_tokens
      decoding="greedy",  # of coupler=None
      mask="block",
      compressor=placeholder(object),  # dict(kind, …): fewer visual tokens of projected patches
      decoder_pruner=placeholder(object),  # dict(block, keep, score): visual tokens that later layers do without
      routing=placeholder(object),  # dict(least, most): decoder layers that see some of the visual tokens
      skip_layers=(),  # of the decoder, left out
      scan=True,
      scan_encoders=variant == "7b",
      remat=placeholder(str),
      dtype="bfloat16" if variant == "7b" else "float32",
    )
  )
  if variant == "7b":
    model.remat = "full"  # the backward pass computes each block again; None is faster where memory allows
  return model


def _optim() -> ConfigDict:
  return ConfigDict(
    dict(
      name="adamw",  # or "muon", for training from scratch
      lr=5e-4,
      warmup_steps=2000,
      decay_steps=80_000,
      end_lr=1e-5,
      b1=0.9,
      b2=0.999,
      eps=1e-8,
      weight_decay=0.01,
      drop_at=placeholder(int),
      drop_to=placeholder(float),
      clip_norm=placeholder(float),
      ema=placeholder(float),  # decay of an average of the trainable parameters, which the policy then takes
      accumulate=1,  # parts of a batch that the gradient is summed over, for less memory; steps stay updates
    )
  )


def _data(variant: str) -> ConfigDict:
  return ConfigDict(
    dict(
      dir="data",
      cache_dir=placeholder(str),  # local, of indices; None: ~/.cache/semanticvla_jax, "": keeps none
      specs=(),  # FILE.py:NAME of the DatasetSpecs of datasets that the package does not know
      skip_bad=False,  # True leaves out episodes that cannot be used, and decodes every image once to find them
      processes=0,  # that decode and augment on each host, where input is waited for; 0: threads of this process alone
      servers=(),  # "host:port" of image servers (docs/training.md) that decode and augment instead; () for none
      mixture="libero_4_task_suites_no_noops",
      batch_size=128,
      trajectory_end="cut",
      augment=True,
      crop_area=0.9,  # of the random crops of training and the center crop of evaluation; None crops in neither
      # Standard deviations in meters and radians: each example's arm is moved off its path, and its actions lead back.
      jitter=(0.0, 0.0),
      diagonal_crop=False,  # True: the release's random crops, whose vertical and horizontal offsets are equal
      normalisation="bounds_q99",
      dct="accurate",  # of JPEGs, in training and evaluation; "fast" is TensorFlow's, which the release has
      pruner_text="question",
      pruner_text_eval=placeholder(str),  # None: as trained; "prompt" is the release's
      prompt_length=64,
      instruction_length=WORDS[variant],
      action_tokens=placeholder(str),  # of model.codec="fast": the file of `data fit-tokenizer`
      tokenizers=placeholder(str),  # a folder; None: those of init_from, or the embedded pair
      keep_statistics=False,  # normalize with the statistics of init_from
    )
  )


def _train() -> ConfigDict:
  return ConfigDict(
    dict(
      steps=80_005,
      save_every=10_000,
      keep_last=3,
      keep_every=placeholder(int),  # checkpoints at multiples of this stay for good
      log_every=50,
      spike=placeholder(float),  # stop where the loss exceeds this many times its recent median
      wandb=placeholder(str),  # project to report to as well
    )
  )
