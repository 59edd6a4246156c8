"""The helper behind the benchmark writes what it says, at the real size and at any other."""

import math

import full_size
import numpy as np

from semanticvla_jax.convert.detect import recognize


def test_the_real_size():
  sizes = [sum(2 * math.prod(shape) for shape in full_size.shapes(layers).values()) for layers in (32, 1)]
  assert len(full_size.shapes(32)) == 982 and sizes[0] == 15_082_474_368 and sizes[1] == 2_534_706_048


def test_a_checkpoint_is_recognised_and_random(tmp_path, monkeypatch):
  small = {key: tuple(min(n, 6) for n in shape) for key, shape in full_size.shapes(2).items()}
  monkeypatch.setattr(full_size, "shapes", lambda layers: small)
  monkeypatch.setattr(full_size, "_BLOCK", 1 << 12)
  total = full_size.write(tmp_path / "source", layers=2, shard=5_000)
  source = recognize([tmp_path / "source"])
  assert source.kind == "openvla-7b" and len(source.tensors) == len(small) and len(source.paths) > 3
  assert sum(x.nbytes for x in source.tensors.values()) == total and source.statistics
  x = source.tensors["projector.fc1.weight"].read().astype(np.float32)
  assert np.isfinite(x).all() and 0.005 < x.std() < 0.05
