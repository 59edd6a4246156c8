"""SigLIP as big_vision releases it: same names, same shapes, and (where big_vision is importable) the same outputs."""

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from semanticvla_jax.convert.io.torch_files import big_vision
from semanticvla_jax.models.semanticvla import VARIANTS
from semanticvla_jax.models.text import TextEncoder
from semanticvla_jax.models.vit import ViT

TREE = Path(__file__).parent / "big_vision_siglip_tree.txt"
SMALL = dict(width=32, depth=2, num_heads=4, mlp_dim=64)


def image_tower(**sizes):
  model = ViT(**sizes, gelu="tanh")
  side = sizes["image"]
  return model, lambda: model.init(jax.random.key(0), jnp.zeros((1, side, side, 3)))


def text_forward(module, ids):
  states = module(ids, None)
  return states, module.pooled(states)


def text_tower(**sizes):
  model = TextEncoder(**sizes)
  ids = jnp.zeros((1, sizes["positions"]), jnp.int32)
  return model, lambda: model.init(jax.random.key(0), ids, method=text_forward)


def shapes(init) -> dict:
  return {path: tuple(x.shape) for path, x in flatten_dict(jax.eval_shape(init)["params"], sep="/").items()}


def test_names_and_shapes_are_big_visions():
  theirs = {}
  for line in TREE.read_text().splitlines():
    path, shape, _ = line.split("\t")
    theirs[path] = tuple(int(n) for n in shape.strip("()").split(",") if n)
  seven = VARIANTS["7b"]
  _, img = image_tower(image=224, patch=14, **seven["siglip"])
  _, txt = text_tower(**seven["text"] | dict(positions=16))
  ours = {f"img/{k}": s for k, s in shapes(img).items()} | {f"txt/{k}": s for k, s in shapes(txt).items()}
  assert ours == {
    k: s for k, s in theirs.items() if k not in ("t", "b")
  }  # temperature and bias of the contrastive loss


def random_npz(tmp_path, scan: bool, half: bool) -> tuple[Path, dict]:
  """A random checkpoint as released files are written, and the plain tree behind it."""
  _, img = image_tower(image=32, patch=8, **SMALL)
  _, txt = text_tower(vocab=40, positions=6, **SMALL)
  rng = np.random.default_rng(0)
  plain = {
    f"{t}/{k}": rng.standard_normal(s).astype(np.float32) * 0.2
    for t, i in (("img", img), ("txt", txt))
    for k, s in shapes(i).items()
  }
  stored = dict(plain)
  if scan:
    for key in [k for k in plain if "encoderblock_0/" in k]:
      layers = [stored.pop(key.replace("encoderblock_0", f"encoderblock_{i}")) for i in range(SMALL["depth"])]
      stored[key.replace("encoderblock_0", "encoderblock")] = np.stack(layers)
  if half:
    stored = {f"params/{k}": x.astype(ml_dtypes.bfloat16).view("V2") for k, x in stored.items()}
    plain = {k: x.astype(ml_dtypes.bfloat16).astype(np.float32) for k, x in plain.items()}
  path = tmp_path / "siglip.npz"
  np.savez(path, **stored)
  return path, plain


@pytest.mark.parametrize(("scan", "half"), [(False, False), (True, False), (True, True)])
def test_released_npz_layouts_load_without_a_rename_table(tmp_path, scan, half):
  path, plain = random_npz(tmp_path, scan, half)
  with np.load(path) as npz:
    towers = {tower: big_vision(dict(npz), tower) for tower in ("img", "txt")}
  ours = {f"{t}/{k}": x.astype(np.float32) for t, tree in towers.items() for k, x in tree.items()}
  assert ours.keys() == plain.keys()
  for key, x in plain.items():
    np.testing.assert_array_equal(ours[key], x)


@pytest.mark.big_vision
def test_outputs_equal_big_visions(tmp_path):
  reason = "needs big_vision: clone it and put it on PYTHONPATH (README, 'big_vision')"
  their_vit = pytest.importorskip("big_vision.models.vit", reason=reason)
  their_text = pytest.importorskip("big_vision.models.proj.image_text.text_transformer", reason=reason)
  path, _ = random_npz(tmp_path, False, False)
  with np.load(path) as npz:
    img, txt = (unflatten_dict(big_vision(dict(npz), tower), sep="/") for tower in ("img", "txt"))
  rng = np.random.default_rng(1)
  pixels, ids = jnp.asarray(rng.standard_normal((2, 32, 32, 3)), jnp.float32), jnp.asarray(rng.integers(0, 40, (2, 6)))
  with jax.default_matmul_precision("highest"):
    ours, _ = image_tower(image=32, patch=8, **SMALL)
    theirs = their_vit.Model(None, patch_size=(8, 8), pool_type="map", **SMALL)
    np.testing.assert_allclose(
      ours.apply({"params": img}, pixels)[1], theirs.apply({"params": img}, pixels)[0], atol=5e-5
    )
    ours, _ = text_tower(vocab=40, positions=6, **SMALL)
    theirs = their_text.Model(num_classes=32, vocab_size=40, **SMALL)
    pooled = ours.apply({"params": txt}, ids, method=text_forward)[1]
    np.testing.assert_allclose(pooled, theirs.apply({"params": txt}, ids)[0], atol=5e-5)
