"""Any sizes, any split into shards, any stored type, any wrapper's prefix: the way there and back changes no bit."""

import json

import checkpoints
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from semanticvla_jax.convert import openvla_layout, to_torch
from semanticvla_jax.convert.detect import recognize
from semanticvla_jax.convert.plan import parameter_shapes
from semanticvla_jax.convert.rules import semanticvla
from semanticvla_jax.convert.to_orbax import Options, not_finite, to_orbax
from semanticvla_jax.models.semanticvla import build

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)


def random_model(rng):
  """OpenVLA or OpenVLA-OFT of random sizes."""

  def encoder():
    heads, depth = int(rng.integers(1, 4)), int(rng.integers(2, 4))
    return dict(width=heads * int(rng.integers(2, 9)), depth=depth, num_heads=heads, mlp_dim=int(rng.integers(3, 40)))

  heads = int(rng.integers(1, 4))
  sizes = dict(vocab=int(rng.integers(300, 400)), depth=int(rng.integers(1, 4)), mlp_dim=int(rng.integers(3, 70)))
  variant = dict(
    image=12,
    patch=int(rng.choice([3, 4, 6])),
    pairs=(),
    dino=encoder() | dict(registers=int(rng.integers(1, 5)), layer_scale=1.0),
    siglip=encoder(),
    text=None,
    llm=sizes | dict(width=heads * 2 * int(rng.integers(1, 6)), num_heads=heads),
  )
  base = checkpoints.model_config("openvla" if rng.integers(2) else "oft")
  return base | dict(variant=variant)


def random_source(rng, folder, model, dtype):
  """Shards of the parameters of `model`, split anyhow, some keys with a wrapper's prefix; heads beside them."""
  bare = build(model)
  shapes = checkpoints.source_shapes(semanticvla.rules_for(bare), parameter_shapes(bare, bare))
  arrays = checkpoints.random(shapes, dtype, seed=int(rng.integers(1 << 30)))
  folder.mkdir()
  shards, weight_map = [{} for _ in range(rng.integers(1, 6))], {}
  for key, x in arrays.items():
    role = key.split(".")[0]
    if role in ("action_head", "proprio_projector"):
      continue
    name = ("module." if rng.integers(2) else "") + openvla_layout.hub_name(key)
    i = int(rng.integers(len(shards)))
    shards[i][name] = x
    weight_map[name] = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
  for i, shard in enumerate(shards):
    if shard:
      save_file(shard, folder / f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors")
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
  for role in ("action_head", "proprio_projector"):
    own = {key.removeprefix(f"{role}."): x for key, x in arrays.items() if key.startswith(f"{role}.")}
    prefix = "module." if rng.integers(2) else ""
    if own:
      save_file({prefix + key: x for key, x in own.items()}, folder / f"{role}--7_checkpoint.safetensors")
  return arrays


@pytest.mark.parametrize("seed", range(6))
def test_there_and_back_is_bit_equal(seed, tmp_path):
  rng = np.random.default_rng(seed)
  model, dtype = random_model(rng), DTYPES[seed % 3]
  arrays = random_source(rng, tmp_path / "source", model, dtype)
  config = {"model": model, "lora": None, "data": {}}
  report = to_orbax([tmp_path / "source"], tmp_path / "policy", config, Options(need_statistics=False))
  assert not report["not_finite"] and not report["dtype_changes"]
  to_torch.to_torch(tmp_path / "policy", tmp_path / "back", to_torch.Options(shard=int(rng.integers(1, 200_000))))
  back = recognize([tmp_path / "back"]).tensors
  assert set(back) == set(arrays)
  for key, x in arrays.items():
    got = back[key].read()
    assert got.dtype == x.dtype and got.shape == x.shape and got.tobytes() == x.tobytes(), key


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_are_counted_in_every_type(dtype):
  x = np.random.default_rng(0).standard_normal((7, 1001)).astype(dtype)
  assert not_finite(x) == 0
  x[2, 5], x[3, :4], x[6, 1000] = np.nan, np.inf, -np.inf
  assert not_finite(x) == 6
  assert not_finite(np.arange(5)) == 0 and not_finite(np.asarray(np.nan, dtype)) == 1
