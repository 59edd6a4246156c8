"""When a loss breaks: where it did, and the batch it broke at, kept to look at and to run a step on."""

from __future__ import annotations

import io
import statistics
import zipfile
import zlib
from collections import deque
from pathlib import Path

import jax
import numpy as np

from semanticvla_jax import cli, files
from semanticvla_jax.errors import refuse
from semanticvla_jax.train import step as stepping
from semanticvla_jax.types import Batch, Observation


class Diverged(RuntimeError):
  """The loss jumped."""


class NotFinite(Diverged):
  """Training met a NaN or Inf."""


def check(recent: list[dict], history: deque, first: int, spike: float | None, trainable: dict) -> None:
  """Looks at the metrics of updates first, first + 1, … and adds their losses to `history`.

  Raises:
    NotFinite, Diverged: with the step and the parts of the model that broke, as `error.step` too.
  """
  for step, values in enumerate(recent, first):
    loss, norm = float(values["loss"]), float(values["grad_norm"])
    norms = {name.partition("/")[2]: float(x) for name, x in values.items() if name.startswith("grad_norm/")}
    if not (np.isfinite(loss) and np.isfinite(norm)):
      families = sorted(name for name, x in norms.items() if not np.isfinite(x)) or stepping.bad_families(trainable)
      error = NotFinite(
        f"step {step}: loss {loss}, gradient norm {norm}; not finite: {families or 'none yet'}. Expected finite "
        "numbers. Lower config.optim.lr, set config.optim.clip_norm, or check the statistics for degenerate ranges "
        "(python -m semanticvla_jax.data statistics). The last checkpoint is untouched."
      )
    elif spike is not None and len(history) >= 20 and loss > spike * statistics.median(history):
      largest = sorted(norms, key=norms.get, reverse=True)[:3]
      error = Diverged(
        f"step {step}: loss {loss:.4g} is {loss / statistics.median(history):.1f} times its recent median, expected at "
        f"most {spike:g} (config.train.spike); largest gradients: {largest}. Look at the batch, lower config.optim.lr, "
        "or set config.optim.clip_norm. The last checkpoint is untouched."
      )
    else:
      history.append(loss)
      continue
    error.step = step
    raise error


def save_batch(batch: Batch, folder: Path, step: int) -> Path:
  """This process's examples of a placed batch as `bad_batch_<step>[_<process>].npz`, arrays named by their fields.

  Targets of an auxiliary loss are left out.
  """

  def local(x):
    parts = {part.index[0].start or 0: part.data for part in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])

  flat, _ = jax.tree_util.tree_flatten_with_path(batch.replace(aux=None))
  named = {"".join(str(key) for key in path).strip("."): local(x) for path, x in flat}
  process = f"_{jax.process_index()}" if jax.process_count() > 1 else ""
  path = folder / f"bad_batch_{step}{process}.npz"
  contents = io.BytesIO()
  np.savez(contents, **named)
  files.write(path, contents.getvalue())
  return path


def load_batch(path: Path) -> Batch:
  """What `save_batch` wrote, as arrays: to look at, or to run a step on (`step.make_step`).

  Raises:
    ValueError: the file is damaged, or holds something else.
  """
  try:
    with np.load(path) as file:
      arrays = dict(file)
    seen = {name.removeprefix("observation."): x for name, x in arrays.items() if name.startswith("observation.")}
    own = {name: arrays[name] for name in ("actions", "action_mask", "labels") if name != "labels" or name in arrays}
    return Batch(Observation(**{"proprio": None} | seen), **own)
  except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
    raise refuse(
      f"{path} is not a saved batch",
      f"{cli.first_line(error)}",
      "a bad_batch_STEP.npz that a training run left",
      "name another file",
    ) from error
