"""Live parity with transformers' own classes at width 32, random weights, through each family's own rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from semanticvla_jax.convert.check import against_torch, torch_models
from semanticvla_jax.convert.rules import engine, llama, text, vit
from semanticvla_jax.models import masks
from semanticvla_jax.models.llama import Llama
from semanticvla_jax.models.text import TextEncoder
from semanticvla_jax.models.vit import ViT

torch = pytest.importorskip("torch", reason="needs torch: run `make parity`")
transformers = pytest.importorskip("transformers", reason="needs transformers: run `make parity`")
pytestmark = [pytest.mark.parity, pytest.mark.parametrize("seed", [0, 1])]

OURS = dict(image=32, patch=8, width=32, depth=3, num_heads=4, mlp_dim=64)


def torch_model(cls, config, seed):
  torch.manual_seed(seed)
  model = cls(config).eval()
  with torch.no_grad():
    for p in model.parameters():
      p.copy_(torch.randn_like(p) * 0.2 + (1.0 if p.ndim == 1 and p.mean() > 0.5 else 0.0))
  return model


def converted(model, rules, init, strip="", unused=None):
  source = {k.removeprefix(strip): v.numpy() for k, v in model.state_dict().items()}
  target = {k: tuple(x.shape) for k, x in flatten_dict(jax.eval_shape(init)["params"], sep="/").items()}
  return {"params": unflatten_dict(engine.convert(rules, unused or {}, source, target), sep="/")}


def assert_close(ours, theirs):
  theirs = theirs.detach().numpy()
  assert np.abs(np.asarray(ours) - theirs).max() / max(1, np.abs(theirs).max()) < against_torch.TOLERANCE


@pytest.fixture(autouse=True)
def highest_precision():
  with jax.default_matmul_precision("highest"):
    yield


def test_siglip_vision(seed):
  ours = ViT(**OURS, gelu="tanh")
  model = torch_model(transformers.SiglipVisionModel, torch_models.siglip_config(ours, 3, vision_use_head=True), seed)
  pixels = np.random.default_rng(seed).standard_normal((2, 32, 32, 3)).astype(np.float32)
  params = converted(model, vit.hf_siglip(), lambda: ours.init(jax.random.key(0), jnp.asarray(pixels)), "vision_model.")
  tokens, pooled = ours.apply(params, jnp.asarray(pixels))
  theirs = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2)))
  assert_close(tokens, theirs.last_hidden_state)
  assert_close(pooled, theirs.pooler_output)


def test_siglip_text(seed):
  ours = TextEncoder(vocab=40, positions=10, width=32, depth=3, num_heads=4, mlp_dim=64)
  model = torch_model(transformers.SiglipTextModel, torch_models.siglip_text_config(ours), seed)
  ids = np.random.default_rng(seed).integers(2, 40, (2, 10))
  mask = np.arange(10) < np.array([[10], [6]])

  def forward(module, ids, mask):
    states = module(ids, mask)
    return states, module.pooled(states)

  init = lambda: ours.init(jax.random.key(0), jnp.asarray(ids), jnp.asarray(mask), method=forward)  # noqa: E731
  params = converted(model, text.hf_siglip_text(), init, "text_model.")
  for m in (mask, None):
    states, pooled = ours.apply(params, jnp.asarray(ids), None if m is None else jnp.asarray(m), method=forward)
    given = {} if m is None else {"attention_mask": torch.from_numpy(m).long()}
    theirs = model(torch.from_numpy(ids), **given)
    rows = np.ones_like(mask) if m is None else mask
    assert_close(states[rows], theirs.last_hidden_state[torch.from_numpy(rows)])
    if m is None:
      assert_close(pooled, theirs.pooler_output)


def test_dinov2_with_registers(seed):
  ours = ViT(**OURS, registers=4, layer_scale=1.0)
  model = torch_model(transformers.Dinov2WithRegistersModel, torch_models.dinov2_config(ours, 3), seed)
  pixels = np.random.default_rng(seed).standard_normal((2, 32, 32, 3)).astype(np.float32)

  def forward(module, pixels):
    x, _ = module.run(module.embed(pixels), 0, 3)
    return module.norm(x)

  init = lambda: ours.init(jax.random.key(0), jnp.asarray(pixels), method=forward)  # noqa: E731
  params = converted(model, vit.hf_dinov2(), init, unused=vit.HF_DINOV2_UNUSED)
  released = {
    "q_proj": "attention.query",
    "k_proj": "attention.key",
    "v_proj": "attention.value",
    "o_proj": "output.dense",
  }
  for key in model.state_dict():  # released files still carry the names of transformers 4
    for new, old in released.items():
      assert vit.canonical_dinov2(key.replace(f"attention.{new}", f"attention.{old}")) == key
  theirs = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2))).last_hidden_state
  assert_close(ours.apply(params, jnp.asarray(pixels), method=forward), theirs)


@pytest.mark.parametrize("scan", [True, False])
def test_llama(seed, scan):
  ours = Llama(vocab=40, width=32, depth=3, num_heads=4, mlp_dim=72, scan=scan)
  model = torch_model(transformers.LlamaModel, torch_models.llama_config(ours, depth=3, vocab=40), seed)
  ids = np.random.default_rng(seed).integers(0, 40, (2, 9))
  valid = jnp.asarray(np.arange(9) < np.array([[9], [6]]))

  def forward(module, ids):
    allowed = masks.attention_mask(valid, jnp.zeros(9, bool), "causal")
    return module(module.embed_tokens(ids), masks.positions(valid), allowed)[0]

  rules = [r for r in llama.hf_llama() if "lm_head" not in r.target]
  rules = [engine.Rule(r.target, r.source.removeprefix("model."), r.pattern) for r in rules]
  params = converted(model, rules, lambda: ours.init(jax.random.key(0), jnp.asarray(ids), method=forward))
  theirs = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(np.asarray(valid)).long()).last_hidden_state
  assert_close(
    ours.apply(params, jnp.asarray(ids), method=forward)[np.asarray(valid)], theirs[torch.from_numpy(np.asarray(valid))]
  )
