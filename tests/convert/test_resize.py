"""Public towers of another size fit where that is asked for; else they are refused; the report says what was done."""

import numpy as np
import pytest
import test_towers as towers
from flax.traverse_util import flatten_dict
from PIL import Image
from safetensors.numpy import save_file

from semanticvla_jax import policy_folder
from semanticvla_jax.convert.rules import engine, resize
from semanticvla_jax.convert.to_orbax import Options, to_orbax

POSITIONS = {"DINOv2, Hugging Face": "embeddings.position_embeddings", "DINOv2, timm": "pos_embed"}


def pillow(x, side):
  """(n, d) resized as a picture a channel, by Pillow's bicubic filter: PyTorch's with antialias=True is the same."""
  grid = x.reshape(int(np.sqrt(len(x))), -1, x.shape[1]).astype(np.float32)
  small = [np.asarray(Image.fromarray(c).resize((side, side), Image.BICUBIC)) for c in np.moveaxis(grid, 2, 0)]
  return np.stack(small, -1).reshape(side * side, -1)


@pytest.mark.parametrize(("old", "new"), [(37, 16), (16, 37), (24, 16)])
def test_positions_are_resampled_as_timm_does(old, new):
  x = np.random.default_rng(0).standard_normal((1, old * old, 3)).astype(np.float32)
  np.testing.assert_allclose(resize.resample(x, new * new)[0], pillow(x[0], new), atol=1e-5)


@pytest.mark.parametrize("kind", POSITIONS)
def test_an_encoder_of_another_image_size(kind, tmp_path):
  stored, key, side = towers.tensors(kind), POSITIONS[kind], 6
  first = stored[key].shape[1] - towers.MODEL.dino.num_patches  # the class token's, of Hugging Face
  rng = np.random.default_rng(1)
  stored[key] = rng.standard_normal((1, first + side * side, towers.MODEL.dino.width)).astype(np.float32)
  save_file(stored, tmp_path / "model.safetensors")
  with pytest.raises(engine.Mismatch, match=key):
    to_orbax([tmp_path / "model.safetensors"], tmp_path / "policy", towers.CONFIG)
  report = to_orbax([tmp_path / "model.safetensors"], tmp_path / "policy", towers.CONFIG, Options(resample=True))
  got = flatten_dict(policy_folder.load_policy(tmp_path / "policy").params, sep="/")["dino/pos_embedding"]
  wanted = pillow(stored[key][0, first:], int(np.sqrt(towers.MODEL.dino.num_patches)))
  np.testing.assert_allclose(got[0], wanted, atol=2e-6)
  assert report["fitted"] == {
    "dino/pos_embedding": f"resampled from 36 to {towers.MODEL.dino.num_patches} places, bicubic with antialiasing"
  }


def test_a_llama_of_fewer_rows(tmp_path):
  stored, key = towers.tensors("Llama, Hugging Face"), "model.embed_tokens.weight"
  rows = len(stored[key]) - 64
  stored[key] = stored[key][:rows]
  save_file(stored, tmp_path / "model.safetensors")
  with pytest.raises(engine.Mismatch, match=key):
    to_orbax([tmp_path / "model.safetensors"], tmp_path / "policy", towers.CONFIG)
  report = to_orbax([tmp_path / "model.safetensors"], tmp_path / "policy", towers.CONFIG, Options(pad_vocabulary=True))
  got = flatten_dict(policy_folder.load_policy(tmp_path / "policy").params, sep="/")["llm/embed/embedding"]
  np.testing.assert_array_equal(got[:rows], stored[key])
  assert not got[rows:].any() and report["fitted"] == {"llm/embed/embedding": f"64 rows of zeros behind {rows}"}


def test_a_whole_model_is_not_made_to_fit(made, tmp_path):
  with pytest.raises(ValueError, match="expected a single tower"):
    to_orbax([made("openvla")[0]], tmp_path / "policy", towers.CONFIG, Options(resample=True))
