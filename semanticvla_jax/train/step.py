"""One training step: a pure function of (state, batch), compiled once over the mesh."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from semanticvla_jax.models.coupler import actions_to_tokens, tokens_to_actions
from semanticvla_jax.models.lora import LoRA
from semanticvla_jax.models.semanticvla import STOP, SemanticVLA
from semanticvla_jax.train import losses, sharding
from semanticvla_jax.train.partition import combine
from semanticvla_jax.types import Batch

# The TPU compiler would split products with a gathered weight into rings of small permutations, a turn a device: for a
# small model on sixteen chips 23,166 permutations and twenty times the launches.
TPU_OPTIONS = {
  "xla_tpu_enable_windowed_einsum_for_all_gather": False,
  "xla_tpu_enable_windowed_einsum_for_reduce_scatter": False,
}


@flax.struct.dataclass
class State:
  """What a step changes.

  Attributes:
    step: i32[], updates made. trainable: parameters with gradients; optimizer: its state.
  """

  step: Any
  trainable: Any
  optimizer: Any


@runtime_checkable
class AuxLoss(Protocol):
  """A loss that is added to the one on the actions: the one place where training is extended from outside.

  It may add parameters to the model (probes, say) and reads its targets from `Batch.aux`. Its means divide by counts
  that depend on the data alone, so that the parts of an accumulated batch add up to the batch.
  """

  def wrap(self, model: nn.Module) -> nn.Module:
    """The module to train: the model's own parameters, and what the loss adds. Called as the model is."""

  def counts(self, aux: Any) -> Any:
    """What the means over a whole batch's targets divide by; a pytree of f32[]."""

  def loss(self, model: nn.Module, params: dict, out: Any, metrics: dict, aux: Any, count: Any) -> tuple[Any, dict]:
    """(f32[], metrics f32[] by name): `out` is what `model` (as wrapped) returned, `metrics` what is known so far."""

  def strip(self, params: dict) -> dict:
    """The parameters without those that `wrap` added: a policy's."""

  def shapes(self, config: Any, model: SemanticVLA) -> Any:
    """`Batch.aux` of a config as jax.ShapeDtypeStructs."""


class Counts(NamedTuple):
  """What the means of a batch's losses divide by.

  Attributes:
    steps: f32[], unmasked ones. aux: the auxiliary loss's own counts. labels: f32[], FAST's tokens and </s>; or None.
  """

  steps: Any
  aux: Any
  labels: Any = None


def counts(batch: Batch, aux_loss: AuxLoss | None) -> Counts:
  """Those of a batch. They depend on the data alone, so that they are known before its first part is worked on."""
  aux = None if aux_loss is None else aux_loss.counts(batch.aux)
  labels = None if batch.labels is None else (batch.labels >= 0).sum(dtype=jnp.float32)
  return Counts(losses.steps(batch.action_mask), aux, labels)


def loss_fn(
  model: nn.Module,
  params: dict,
  batch: Batch,
  key: jax.Array,
  aux_loss: AuxLoss | None = None,
  count: Counts | None = None,
  part: tuple[jax.Array, int] | None = None,
  updates: jax.Array | int = 0,
):
  """Loss and metrics of one batch: L1 over the chunk, plus `aux_loss` where there is one.

  A model without a coupler learns action tokens instead, see `token_loss` and, for FAST's, `label_loss`.

  Args:
    count: `counts` of the whole batch, and part: (i, p), where these are its examples i, i + p, …; None: they are all.
      What the parts of a batch return adds up to what the batch does.
    updates: made so far, for noise that becomes less.
  """
  count = counts(batch, aux_loss) if count is None else count
  bare = getattr(model, "model", model)
  if bare.coupler is None:
    return (token_loss if bare.codec is None else label_loss)(model, params, batch, count)
  how = dict(train=True, part=part, updates=updates, rngs={"noise": key})
  out = model.apply({"params": params}, batch.observation, **how)
  loss, metrics = losses.l1(out.actions, batch.actions, batch.action_mask, count.steps)
  metrics["l1"] = loss
  metrics["tokens"] = out.intermediates["valid"].sum(dtype=jnp.float32)  # of the language model, without padding
  if aux_loss is not None:
    added, each = aux_loss.loss(model, params, out, metrics, batch.aux, count.aux)
    loss, metrics = loss + added, metrics | each
  return loss, metrics


def token_loss(model: nn.Module, params: dict, batch: Batch, count: Counts):
  """Cross entropy of the action tokens and </s> behind each prompt (OpenVLA), in float32, and its metrics.

  `accuracy` is the share of action tokens that are most likely given those before them, `l1…` the distance of the
  actions they stand for. See `loss_fn` for `count`.
  """
  bare = getattr(model, "model", model)
  (_, k, a), vocab = batch.actions.shape, bare.spoken_vocab
  n = k * a
  spoken = actions_to_tokens(batch.actions.reshape(-1, n), vocab)
  inside = jnp.repeat(batch.action_mask, a, axis=1)  # which of these are of steps inside the trajectory
  trained = jnp.concatenate([inside, inside[:, -1:]], axis=1)  # </s> goes with the last step
  tokens = jnp.pad(spoken, ((0, 0), (0, 1)), constant_values=STOP)
  observation = batch.observation
  ids, real, number = losses.append(observation.prompt, observation.prompt_mask, tokens)
  logits, seen = _logits(model, params, observation.replace(prompt=ids, prompt_mask=real))
  each = (number >= 0) & (number <= n) & jnp.take_along_axis(trained, jnp.clip(number, 0, n), axis=1)
  loss = losses.next_token(logits, ids, each, (a + 1 / k) * count.steps)
  before = batch.observation.prompt_mask.sum(axis=-1)[:, None] - 1 + jnp.arange(n)  # where token 0, 1, … is predicted
  likely = jnp.take_along_axis(jnp.argmax(logits, axis=-1), before, axis=1)
  actions = tokens_to_actions(likely, vocab).reshape(batch.actions.shape)
  distance, metrics = losses.l1(actions, batch.actions, batch.action_mask, count.steps)
  hits = (likely == spoken) & inside
  metrics["accuracy"] = losses.divided(hits.sum(dtype=jnp.float32), a * count.steps)
  metrics["l1"], metrics["tokens"] = distance, seen["valid"].sum(dtype=jnp.float32)
  return loss, metrics


def label_loss(model: nn.Module, params: dict, batch: Batch, count: Counts):
  """Cross entropy of FAST's tokens and </s> behind each prompt, in float32, and its metrics, of which `accuracy` is the
  share of them that is most likely given those before.

  A token covers several numbers of the whole chunk, so that a step outside the trajectory is learned too: the robot
  stays where it is (trajectories.windows). See `loss_fn` for `count`.
  """
  observation, labels = batch.observation, batch.labels
  ids, _, number = losses.append(observation.prompt, observation.prompt_mask, labels)
  real = number < (labels >= 0).sum(axis=1, keepdims=True)
  ids, each = jnp.where(real, ids, 0), real & (number >= 0)
  logits, seen = _logits(model, params, observation.replace(prompt=ids, prompt_mask=real))
  loss = losses.next_token(logits, ids, each, count.labels)
  hits = (jnp.argmax(logits[:, :-1], axis=-1) == ids[:, 1:]) & each[:, 1:]
  metrics = {"accuracy": losses.divided(hits.sum(dtype=jnp.float32), count.labels)}
  metrics["tokens"] = seen["valid"].sum(dtype=jnp.float32)
  return loss, metrics


def _logits(model: nn.Module, params: dict, observation: Any) -> tuple[Any, dict]:
  """`SemanticVLA.logits`, through the adapters where there are any."""
  how = {"call": "logits"} if isinstance(model, LoRA) else {"method": "logits"}
  return model.apply({"params": params}, observation, **how)


def make_step(
  model: nn.Module,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
  seed: int,
  aux_loss: AuxLoss | None = None,
  accumulation_steps: int = 1,
) -> Callable:
  """step(state, frozen, batch) → (state, metrics). The noise of step n depends on (seed, n) alone, that of an example
  not on the part it is in.

  Args:
    model: to train; with an auxiliary loss, as `aux_loss.wrap` returned it.
    schedule: the learning rate of `tx` by update, for the metrics.
    accumulation_steps: config.optim.accumulate.
  """

  def step(state: State, frozen: dict, batch: Batch):
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    count = counts(batch, aux_loss)

    def loss(trainable, batch, part):
      return loss_fn(model, combine(trainable, frozen), batch, key, aux_loss, count, part, state.step)

    gradient = jax.value_and_grad(loss, has_aux=True)
    (value, metrics), gradients = accumulate_gradients(gradient, state.trainable, batch, accumulation_steps)
    updates, optimizer = tx.update(gradients, state.optimizer, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    metrics |= dict(
      loss=value,
      grad_norm=optax.global_norm(gradients),
      update_norm=optax.global_norm(updates),
      lr=jnp.asarray(schedule(state.step), jnp.float32),
    )
    metrics |= {f"grad_norm/{name}": optax.global_norm(part) for name, part in gradients.items()}
    return State(state.step + 1, trainable, optimizer), metrics

  return step


def accumulate_gradients(gradient: Callable, trainable: Any, batch: Batch, n: int):
  """((loss, metrics), gradients) of a batch in `n` parts, one after another, for the memory of one part.

  All are sums over the parts, each of which divides by the counts of the whole batch: they are the batch's own, however
  its masked steps are spread. Example r goes to part r mod `n`, so that none leaves its device.

  Args:
    gradient: (trainable, batch, part) → ((loss, metrics), gradients), see `loss_fn`.
    batch: arrays [b …]; `n` divides b.
  """
  if n == 1:
    return gradient(trainable, batch, None)

  def split(x):
    parts = x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1)  # [n b/n …]
    return nn.with_logical_constraint(parts, (None, "batch", *[None] * (x.ndim - 1)))

  def add(total, part):
    number, examples = part
    values, gradients = gradient(trainable, examples, (number, n))
    return jax.tree.map(jnp.add, total, gradients), values

  parts = (jnp.arange(n), jax.tree.map(split, batch))
  total, values = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, trainable), parts)
  return jax.tree.map(lambda x: x.sum(axis=0), values), total


def new_state(tx: optax.GradientTransformation, trainable: dict) -> State:
  """The state before the first update (inside jit, or under eval_shape for its shapes)."""
  return State(jnp.zeros((), jnp.int32), trainable, tx.init(trainable))


def state_sharding(state: Any, mesh: Mesh, rule: sharding.Rule = sharding.DEFAULT_RULE) -> State:
  """Where the state lives: parameters and moments by the one rule, counters everywhere."""
  return State(
    NamedSharding(mesh, P()),
    sharding.param_sharding(state.trainable, mesh, rule),
    sharding.param_sharding(state.optimizer, mesh, rule),
  )


def jit_step(
  step: Callable, mesh: Mesh, state: Any, frozen: Any, rule: sharding.Rule = sharding.DEFAULT_RULE
) -> Callable:
  """The step under jit with its shardings; the state is donated. Call or lower it inside `over(mesh)`."""
  where = state_sharding(state, mesh, rule)
  return jax.jit(
    step,
    in_shardings=(where, sharding.param_sharding(frozen, mesh, rule), sharding.batch_sharding(mesh)),
    out_shardings=(where, NamedSharding(mesh, P())),
    donate_argnums=0,
    compiler_options=TPU_OPTIONS if mesh.devices.flat[0].platform == "tpu" else None,
  )


@contextlib.contextmanager
def over(mesh: Mesh) -> Iterator[None]:
  """Gives the models' logical axes their meaning on `mesh` (`with mesh:` would drop them silently)."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.ACTIVATIONS):
    yield


def compile_step(
  step: Callable,
  mesh: Mesh,
  state: Any,
  frozen: Any,
  rule: sharding.Rule = sharding.DEFAULT_RULE,
  meet: Callable[[], None] | None = None,
) -> Callable:
  """The step as one program over `mesh`.

  Several processes pass `meet`, where each waits for the others once it has compiled: whoever runs first would give up
  on the others' part of a collective after half a minute (Gloo, on CPUs).
  """
  jitted = jit_step(step, mesh, state, frozen, rule)
  compiled: list[Callable] = [] if meet is not None else [jitted]

  def run(*args):
    with over(mesh):
      if not compiled:
        compiled.append(jitted.lower(*args).compile())
        meet()
      return compiled[0](*args)

  return run


def bad_families(trainable: Any) -> list[str]:
  """Top-level parts that hold a NaN or Inf."""
  finite = jax.tree.map(lambda x: bool(jnp.isfinite(x).all()), trainable)
  return sorted(name for name, part in finite.items() if not all(jax.tree.leaves(part)))
