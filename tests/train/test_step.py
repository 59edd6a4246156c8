"""The step around a model of one line: accumulation, clipping, the learning rate and averages go by updates."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from semanticvla_jax.train import losses, optimizer, sharding
from semanticvla_jax.train import step as stepping
from semanticvla_jax.types import Batch, Observation

MODEL = nn.Dense(1)  # not looked at


def toy_loss(model, params, batch, key, aux_loss, count, part, updates):
  """Least squares over what is not masked; its gradient is linear in the examples."""
  error = (batch.observation.proprio @ params["w"] - batch.actions) * batch.action_mask[:, 0]
  told = {"l1": losses.divided(jnp.abs(error).sum(), count.steps), "tokens": jnp.float32(len(error))}
  return losses.divided(jnp.square(error).sum(), count.steps), told


def optim(**changes):
  c = common.get_config("tiny").optim
  c.update(dict(lr=0.1, warmup_steps=4, decay_steps=10, weight_decay=0.0) | changes)
  return c


def examples(step, size=16):
  rng = np.random.default_rng(step)
  x, y = rng.normal(size=(size, 3)).astype(np.float32), rng.normal(size=size).astype(np.float32)
  return Batch(Observation(None, x, None, None), y, rng.random((size, 1)) < 0.7)


def run(c, first, last, state=None, mesh=None):
  """States and metrics of updates first … last − 1."""
  transform, history = optimizer.transform(c), []
  step = stepping.make_step(MODEL, transform, optimizer.schedule(c), 0, None, c.accumulate)
  state = stepping.new_state(transform, {"w": jnp.ones(3)}) if state is None else state
  step = jax.jit(step)
  for i in range(first, last):
    batch = examples(i) if mesh is None else sharding.place_whole(examples(i), mesh)
    state, metrics = step(state, {}, batch)
    history.append({name: float(x) for name, x in metrics.items()})
  return state, history


@pytest.fixture(autouse=True)
def toy(monkeypatch):
  monkeypatch.setattr(stepping, "loss_fn", toy_loss)


def test_parts_of_a_batch_equal_the_batch():
  whole, told = run(optim(clip_norm=0.5, ema=0.9), 0, 3)
  for turns in (2, 8):
    parts, said = run(optim(clip_norm=0.5, ema=0.9, accumulate=turns), 0, 3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), parts, whole)
    for one, other in zip(said, told):
      assert one == pytest.approx(other, rel=1e-5)  # norms, rates and tokens too
  assert int(whole.step) == 3


def test_parts_stay_on_their_devices():
  mesh = sharding.make_mesh(dict(fsdp=8))
  with stepping.over(mesh):
    parts, _ = run(optim(accumulate=2), 0, 2, mesh=mesh)
    step = stepping.make_step(MODEL, optimizer.transform(optim()), lambda step: 0.1, 0, None, 2)
    batch = sharding.place_whole(examples(0), mesh)
    text = jax.jit(step).lower(parts, {}, batch).compile().as_text()
  alone, _ = run(optim(), 0, 2)
  np.testing.assert_allclose(parts.trainable["w"], alone.trainable["w"], rtol=1e-5)
  assert "all-to-all" not in text and "collective-permute" not in text and "all-gather" not in text


def test_the_rate_told_is_the_one_applied_and_clipping_takes_effect():
  c = optim(accumulate=4)
  _, told = run(c, 0, 6)
  assert [m["lr"] for m in told] == pytest.approx([float(optimizer.schedule(c)(i)) for i in range(6)])
  assert told[0]["update_norm"] == 0 and all(m["update_norm"] > 0 for m in told[1:])
  plain, limit = optax.sgd(1.0), 1e-3
  c = optim(accumulate=4, clip_norm=limit)
  clipped = optax.chain(optax.clip_by_global_norm(c.clip_norm), plain)
  step = jax.jit(stepping.make_step(MODEL, clipped, lambda step: 1.0, 0, None, c.accumulate))
  _, metrics = step(stepping.new_state(clipped, {"w": jnp.ones(3)}), {}, examples(0))
  assert float(metrics["grad_norm"]) > limit and float(metrics["update_norm"]) == pytest.approx(limit, rel=1e-4)


def test_going_on_in_the_middle_is_exact_with_averages():
  c = optim(accumulate=2, ema=0.9, clip_norm=1.0)
  straight, told = run(c, 0, 5)
  half, first = run(c, 0, 2)
  again, second = run(c, 2, 5, jax.tree.map(np.asarray, half))
  jax.tree.map(np.testing.assert_array_equal, again, straight)
  assert first + second == told


def test_a_batch_divides_over_devices_and_turns():
  sharding.check_rows(16, 4, 2)
  for size, n, turns in ((16, 4, 8), (16, 4, 0)):
    with pytest.raises(ValueError, match=f"got 16 examples; expected a multiple of the 4 .* {turns} turns"):
      sharding.check_rows(size, n, turns)
