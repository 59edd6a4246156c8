"""Where training batches come from: RLDS datasets, or a generator on the device; and their tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from etils import epath

from semanticvla_jax import action_tokens
from semanticvla_jax.data import datasets, mixtures, statistics, text
from semanticvla_jax.errors import refuse
from semanticvla_jax.models.semanticvla import STOP
from semanticvla_jax.train import from_specs, init, sharding
from semanticvla_jax.types import Batch

if TYPE_CHECKING:
  from semanticvla_jax.data import loader, rlds


class Source(NamedTuple):
  """Batches and what they were made from.

  Attributes:
    batches: step → placed Batch; steps come in order.
    statistics: by dataset. digests: of each dataset read, {} where the examples are generated.
  """

  batches: Callable[[int], Any]
  statistics: dict[str, statistics.DatasetStatistics]
  digests: dict[str, str]


def tokenizer_files(config: Any) -> dict[str, epath.Path]:
  """{name: path} of the run's SentencePiece files: of config.data.tokenizers; of the bases, of which later ones give
  what the first lacks; or the embedded pair. And of its action tokens, where it has any.
  """
  spoken = init.action_tokens_file(config)
  return _words(config) | ({} if spoken is None else {action_tokens.NAME: spoken})


def _words(config: Any) -> dict[str, epath.Path]:
  if config.data.tokenizers is not None:
    return text.files(config.data.tokenizers)
  folders, _ = init.bases(config.init_from)
  found = {}
  for folder in folders:
    found = text.files(epath.Path(folder).expanduser() / "tokenizers") | found
  return found or text.files(text.EMBEDDED)


def load_tokenizers(config: Any, bare: Any) -> text.Tokenizers:
  """The tokenizers of the config, SigLIP's only for a model with its text tower (a base's folder may hold it all the
  same). Raises ValueError when they are not this model's.
  """
  tokenizers = text.load(
    tokenizer_files(config),
    prompt_length=config.data.prompt_length,
    instruction_length=config.data.instruction_length,
    pruner_text=config.data.pruner_text,
  )
  if config.data.pruner_text_eval not in (None, *text.PRUNER_TEXTS):
    raise refuse(
      "config.data.pruner_text_eval",
      f"{config.data.pruner_text_eval!r}",
      f"None (as trained) or one of {text.PRUNER_TEXTS}",
      "change it",
    )
  if not bare.llm.vocab - 64 <= tokenizers.pad_id < bare.llm.vocab:
    raise refuse(
      f"config.data.tokenizers={config.data.tokenizers!r}",
      f"{tokenizers.pad_id} pieces",
      f"nearly {bare.llm.vocab} (the model's embedding rows)",
      "name the folder of the base checkpoint's tokenizer.model",
    )
  return tokenizers if bare.text is not None else tokenizers._replace(siglip=None)


def image_options(data: Any) -> dict:
  """How `loader.BatchOptions` treats images: what evaluation crops is what training cropped.

  Raises:
    ValueError: random crops without an area, or an area outside (0, 1].
  """
  from semanticvla_jax.data import images

  area = data.crop_area
  if (data.augment and area is None) or (area is not None and not 0 < area <= 1):
    raise refuse(
      "config.data",
      f"augment={data.augment}, crop_area={area}",
      "a share of the image in (0, 1], which the random crops of training keep and evaluation cuts out of the middle",
      "set crop_area=0.9 as released, 1.0 to crop nothing, or augment=False",
    )
  if not data.augment:
    return dict(crop_area=area, dct=data.dct)
  return dict(augmentation=images.Augmentation(crop_area=area, diagonal_crop=data.diagonal_crop), dct=data.dct)


def kept_statistics(base: dict, name: str) -> statistics.DatasetStatistics:
  """The base's statistics for a dataset: those of that name, else the only ones it has.

  Raises:
    ValueError: it has several, none of that name.
  """
  if name not in base and len(base) != 1:
    raise refuse(
      "config.data.keep_statistics",
      f"statistics of {sorted(base)} in the base",
      f"those of {name!r} or of one dataset alone",
      "set it to False, or name the dataset as the base does",
    )
  return base[name] if name in base else next(iter(base.values()))


def check_robot(config: Any, bare: Any, name: str, spec: Any) -> None:
  """Raises ValueError unless a dataset is of the robot that the model is for; before anything is read or compiled."""
  proprio = spec.proprio_dim if bare.proprio_dim is None else bare.proprio_dim  # None: the model reads none
  have = (len(spec.views), spec.proprio_dim, len(spec.normalized))
  want = (bare.num_views, proprio, config.model.action_dim)
  if have != want:
    raise refuse(
      f"Dataset {name!r} is of another robot than the model",
      f"(views, proprio_dim, action_dim) {have}",
      want,
      "take the config of that robot, e.g. configs/aloha.py or configs/bridge.py, or set config.model; "
      "configs/robot.py takes all of it from config.data.specs",
    )
  groups = config.model.get("groups")
  if groups is not None and spec.groups is not None and {n: tuple(dims) for n, dims in groups} != spec.groups:
    raise refuse(
      f"Dataset {name!r}, groups",
      f"{spec.groups}",
      f"{dict(groups)} (config.model.groups)",
      "leave config.model.groups at None, or correct the DatasetSpec",
    )
  if any(config.data.jitter) and min(len(spec.absolute), spec.proprio_dim) < 6:
    raise refuse(
      "config.data.jitter",
      f"{config.data.jitter} with {len(spec.absolute)} action and {spec.proprio_dim} proprioception dimensions",
      "an end effector's position and attitude first in both",
      "set config.data.jitter=(0.0, 0.0)",
    )
  hidden = [view for i, view in enumerate(spec.views) if view in spec.optional and i not in bare.optional_views]
  if hidden:
    raise refuse(
      f"Dataset {name!r}, optional views",
      f"{hidden}, which the model takes for always there",
      "their numbers in config.model.optional_views",
      "set them, or leave the field at () with the spec in config.data.specs",
    )


def dataset_specs(config: Any, bare: Any) -> dict[str, datasets.DatasetSpec]:
  """The spec of each dataset of the config's mixture, with the views that the model sees and the config's bounds.

  Raises:
    ValueError: a dataset without a spec, or bounds that do not exist.
  """
  own, mode = from_specs.own_specs(config), config.data.normalisation
  if mode not in statistics.MODES:
    raise refuse("Unknown normalisation", f"{mode!r}", f"one of {(*statistics.MODES,)}", "correct the config")

  def spec(name):
    whole = datasets.spec(name, own)
    seen = whole.views[: bare.num_views]  # OpenVLA looks through the first camera alone
    optional = tuple(view for view in whole.optional if view in seen)
    aliases = {view: keys for view, keys in whole.aliases.items() if view in seen}
    return whole._replace(views=seen, optional=optional, aliases=aliases, mode=mode)

  return {name: spec(name) for name, _ in mixtures.mixture(config.data.mixture)}


def rlds_loader(
  config: Any, bare: Any, tokenizers: text.Tokenizers, base: dict | None = None
) -> tuple[loader.BatchLoader, list[rlds.Dataset]]:
  """The loader of the config's RLDS mixture, and its datasets; `base`: statistics of the base, see make_source.

  Raises:
    ValueError: datasets that cannot be read, or are not for this model.
  """
  from semanticvla_jax.data import loader, rlds

  specs = dataset_specs(config, bare)

  def load(name):
    given = kept_statistics(base, name) if base is not None and config.data.keep_statistics else None
    how = dict(given=given, cache_dir=config.data.cache_dir, skip_bad=config.data.get("skip_bad", False))
    return rlds.load(config.data.dir, name, spec=specs[name], **how)

  of_images, chosen = image_options(config.data), mixtures.mixture(config.data.mixture)
  for name, spec in specs.items():
    check_robot(config, bare, name, spec)
  mixture = [(load(name), weight) for name, weight in chosen]
  options = loader.BatchOptions(
    batch_size=config.data.batch_size,
    chunk=config.model.chunk,
    image_size=(bare.siglip or bare.dino).image,
    seed=config.seed,
    trajectory_end=config.data.trajectory_end,
    jitter=loader.Jitter(*config.data.jitter),
    **of_images,
  )
  return loader.BatchLoader(mixture, tokenizers, options), [dataset for dataset, _ in mixture]


def servers_of_host(servers: Sequence[str], host: int, hosts: int) -> tuple[str, ...]:
  """The image servers that a training host asks: a share of its own, or one of too few for all."""
  return tuple(servers[host::hosts] or servers[host % len(servers) :][:1]) if servers else ()


def make_source(
  config: Any, bare: Any, tokenizers: text.Tokenizers, mesh: Any, start: int, base: dict | None, generator: Any = None
) -> Source:
  """The config's batches from global step `start` on, this process's part of each placed on the mesh.

  Args:
    base: statistics of the base by dataset, None without one.
    generator: what makes the examples on the device, see semanticvla_jax.sources; None reads datasets.
  """
  size = config.data.batch_size
  if generator is not None:
    name = config.data.mixture
    kept = kept_statistics(base, name) if base is not None and config.data.keep_statistics else None
    make, stats = generator.batches(config, bare, tokenizers, kept)
    return Source(lambda step: sharding.place_whole(as_read(make(step), bare), mesh), {name: stats}, {})
  rows = sharding.host_rows(size, mesh)
  made, read = rlds_loader(config, bare, tokenizers, base)
  servers = servers_of_host(config.data.get("servers", ()), jax.process_index(), jax.process_count())
  iterator = made.batches(start, rows, processes=config.data.get("processes", 0), servers=servers)
  place = lambda step: sharding.place_batch(as_read(next(iterator), bare), mesh, size)  # noqa: E731
  return Source(place, {one.name: one.statistics for one in read}, {one.name: one.digest for one in read})


def as_read(batch: Batch, bare: Any) -> Batch:
  """The batch without the parts of an observation that the model has no place for, and with the labels of FAST."""
  seen = batch.observation
  if bare.proprio_dim is None:
    seen = seen.replace(proprio=None)
  if bare.text is None:
    seen = seen.replace(instruction=None, instruction_mask=None)
  labels = None
  if bare.codec is not None:
    labels = bare.codec.labels(np.asarray(batch.actions), bare.spoken_vocab, STOP)
  return batch.replace(observation=seen, labels=labels)
