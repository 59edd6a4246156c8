"""A batch taken in parts is the batch: unevenly masked steps, losses, metrics, gradients, and the pruners' noise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import random_observation, random_params, tiny

from configs import openvla
from semanticvla_jax.models.semanticvla import build
from semanticvla_jax.tabletop import auxiliary_losses
from semanticvla_jax.train import losses, resume
from semanticvla_jax.train import step as stepping
from semanticvla_jax.types import Batch, Observation

B, G, V, N, M = 4, 2, 2, 64, 32
WEIGHTS = dict(alignment=0.1, naming=0.2, looks=0.1, displacement=0.3, aim=0.5, turn=0.2, rotation=0.4)


def after(model, params, batch, turns, aux_loss=None):
  """The update's gradients (through plain descent) and its metrics, the noise of the pruners included."""
  transform = optax.sgd(1.0)
  step = stepping.make_step(model, transform, lambda step: 1.0, 3, aux_loss, turns)
  state, metrics = jax.jit(step)(stepping.new_state(transform, params), {}, batch)
  return jax.tree.map(jnp.subtract, params, state.trainable), {name: float(x) for name, x in metrics.items()}


def same(one, other):
  (gradients, metrics), (wanted, told) = one, other
  assert metrics == pytest.approx(told, rel=2e-4, abs=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), gradients, wanted)


@pytest.mark.slow
def test_l1_and_an_auxiliary_loss():
  aux_loss, rng = auxiliary_losses.AuxiliaryLosses(WEIGHTS), np.random.default_rng(0)
  model = aux_loss.wrap(tiny())
  params = random_params(tiny())
  for name, shape in (("probe", (96, 9)), ("probe_aim", (96, 4)), ("probe_dino", (16, 5)), ("probe_siglip", (24, 5))):
    params[name] = {"kernel": jnp.asarray(0.1 * rng.normal(size=shape), jnp.float32), "bias": jnp.zeros(shape[1])}
  lengths = np.array([8, 1, 3, 0])  # real steps; the last example has none
  where = jax.nn.one_hot(rng.integers(0, N, (B, 1 + G, V)), N) * (rng.random((B, 1 + G, V, 1)) < 0.6)
  edges = jnp.zeros((B, G, V, 2)).at[1, 0, :, 1].set(1.0)
  targets = auxiliary_losses.Targets(
    where,
    jnp.asarray(rng.integers(3, 200, (B, G, M))),
    jnp.arange(M)[None, None] < jnp.full((B, G, 1), 5),
    jnp.asarray(rng.normal(size=(B, 9)), jnp.float32),
    jnp.zeros((B, G), jnp.int32),
    edges,
    edges[:, 0],
  )
  actions = jnp.asarray(rng.uniform(-1, 1, (B, 8, 7)), jnp.float32)
  batch = Batch(random_observation(tiny(), B), actions, jnp.arange(8) < lengths[:, None], targets)
  whole = after(model, params, batch, 1, aux_loss)
  same(after(model, params, batch, 4, aux_loss), whole)
  assert whole[1]["tokens"] > 0 and whole[1]["aim"] > 0


def test_action_tokens():
  config = openvla.get_config("@tiny")
  model = build(config.model)
  params, rng = random_params(model), np.random.default_rng(0)
  observation = random_observation(model, B, 12, lengths=np.array([12, 9, 7, 12]))
  mask = jnp.asarray([[True], [False], [True], [True]])
  batch = Batch(observation, jnp.asarray(rng.uniform(-1, 1, (B, 1, 7)), jnp.float32), mask)
  same(after(model, params, batch, 2), after(model, params, batch, 1))


@pytest.mark.parametrize("turns", [1, 2, 4])
def test_eight_examples_of_which_two_have_one_step(turns):
  mask = np.ones((8, 8), bool)
  mask[[1, 3], 1:] = False
  error = np.where(np.arange(8)[:, None] % 2, 3.0, 1.0) * np.ones((8, 8))  # a part of odd examples is much worse
  batch = Batch(Observation(None, jnp.asarray(error), None, None), None, jnp.asarray(mask))

  def gradient(scale, batch, part):
    count = losses.steps(jnp.asarray(mask))

    def loss(scale):
      predicted = jnp.repeat((scale * batch.observation.proprio)[..., None], 7, axis=2)
      return losses.l1(predicted, jnp.zeros_like(predicted), batch.action_mask, count)

    return jax.value_and_grad(loss, has_aux=True)(scale)

  (value, groups), slope = stepping.accumulate_gradients(gradient, jnp.float32(1.0), batch, turns)
  wanted = error[mask].mean()
  assert [float(value), float(slope), *map(float, groups.values())] == pytest.approx([wanted] * 5)
  assert wanted < error.mean()


def test_a_batch_without_a_single_step_has_no_loss():
  predicted = jnp.ones((2, 3, 7))
  loss, _ = losses.l1(predicted, 0 * predicted, jnp.zeros((2, 3), bool))
  assert float(loss) == 0.0


def test_a_resumed_run_may_take_its_batches_in_other_parts():
  assert resume.differences({"optim": {"accumulate": 1}}, {"optim": {"accumulate": 4}}) == []
