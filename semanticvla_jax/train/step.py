"""One training step: a pure function of (state, batch), compiled once over the mesh."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from semanticvla_jax.models.coupler import actions_to_tokens, tokens_to_actions
from semanticvla_jax.models.lora import LoRA
from semanticvla_jax.models.semanticvla import STOP
from semanticvla_jax.tabletop import auxiliary_losses
from semanticvla_jax.train import losses, sharding
from semanticvla_jax.train.partition import combine
from semanticvla_jax.types import Batch


@flax.struct.dataclass
class State:
  """What a step changes.

  Attributes:
    step: i32[], updates made. trainable: parameters with gradients; optimizer: its state.
  """

  step: Any
  trainable: Any
  optimizer: Any


class Counts(NamedTuple):
  """What the means of a batch's losses are taken over: unmasked steps f32[], and those of the hints' losses."""

  steps: Any
  hints: auxiliary_losses.Counts | None


def counts(batch: Batch, hints: auxiliary_losses.Hints | None) -> Counts:
  """Those of a batch. They depend on data alone, so that they are known before its first part is worked on."""
  return Counts(losses.steps(batch.action_mask), None if hints is None else auxiliary_losses.counts(hints))


def loss_fn(
  model: nn.Module,
  params: dict,
  batch: Batch,
  key: jax.Array,
  hints: auxiliary_losses.Hints | None,
  weights: Any,
  count: Counts | None = None,
  part: tuple[jax.Array, int] | None = None,
):
  """Loss and metrics of one batch: L1 over the chunk, plus what the hints teach (see grounding) where there are any.

  A model without a coupler learns action tokens instead, see `token_loss`.

  Args:
    count: `counts` of the whole batch, and part: (i, p), where these are its examples i, i + p, …; None: they are all.
      What the parts of a batch return adds up to what the batch does.
  """
  count = counts(batch, hints) if count is None else count
  if getattr(model, "model", model).coupler is None:
    return token_loss(model, params, batch, count)
  out = model.apply({"params": params}, batch.observation, train=True, part=part, rngs={"noise": key})
  loss, metrics = losses.l1(out.actions, batch.actions, batch.action_mask, count.steps)
  metrics["l1"] = loss
  metrics["tokens"] = out.intermediates["valid"].sum(dtype=jnp.float32)  # of the language model, without padding
  if hints is not None:
    taught, each = auxiliary_losses.loss(model, params, out, hints, weights, count.hints)
    taught += weights["rotation"] * metrics["l1_rotation"]
    loss, metrics = loss + taught, metrics | each
  return loss, metrics


def token_loss(model: nn.Module, params: dict, batch: Batch, count: Counts):
  """Cross entropy of the action tokens and </s> behind each prompt (OpenVLA), in float32, and its metrics.

  `accuracy` is the share of action tokens that are most likely given those before them, `l1…` the distance of the
  actions they stand for. See `loss_fn` for `count`.
  """
  bare = getattr(model, "model", model)
  n, vocab = batch.actions.shape[-1], bare.spoken_vocab
  spoken = actions_to_tokens(batch.actions[:, 0], vocab)
  tokens = jnp.pad(spoken, ((0, 0), (0, 1)), constant_values=STOP)
  observation = batch.observation
  ids, real, number = losses.append(observation.prompt, observation.prompt_mask, tokens)
  observation = observation.replace(prompt=ids, prompt_mask=real)
  how = {"call": "logits"} if isinstance(model, LoRA) else {"method": "logits"}
  logits, seen = model.apply({"params": params}, observation, **how)
  each = (number >= 0) & (number <= n) & batch.action_mask[:, :1]
  loss = losses.next_token(logits, ids, each, (n + 1) * count.steps)
  before = batch.observation.prompt_mask.sum(axis=-1)[:, None] - 1 + jnp.arange(n)  # where token 0, 1, … is predicted
  likely = jnp.take_along_axis(jnp.argmax(logits, axis=-1), before, axis=1)
  actions = tokens_to_actions(likely, vocab)[:, None]
  distance, metrics = losses.l1(actions, batch.actions, batch.action_mask, count.steps)
  hits = (likely == spoken) & batch.action_mask[:, :1]
  metrics["accuracy"] = losses.divided(hits.sum(dtype=jnp.float32), n * count.steps)
  metrics["l1"], metrics["tokens"] = distance, seen["valid"].sum(dtype=jnp.float32)
  return loss, metrics


def make_step(
  model: nn.Module,
  transform: optax.GradientTransformation,
  rate: optax.Schedule,
  seed: int,
  weights: Any = None,
  turns: int = 1,
) -> Callable:
  """step(state, frozen, batch, hints) → (state, metrics). The noise of step n depends on (seed, n) alone,
  that of an example not on the part it is in.

  `weights` are those of the grounding losses, for batches that come with hints. `turns` is config.optim.accumulate.
  """

  def step(state: State, frozen: dict, batch: Batch, hints: Any):
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    count = counts(batch, hints)

    def loss(trainable, batch, hints, part):
      return loss_fn(model, combine(trainable, frozen), batch, key, hints, weights, count, part)

    gradient = jax.value_and_grad(loss, has_aux=True)
    (value, metrics), gradients = in_turns(gradient, state.trainable, (batch, hints), turns)
    updates, optimizer = transform.update(gradients, state.optimizer, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    metrics |= dict(
      loss=value,
      grad_norm=optax.global_norm(gradients),
      update_norm=optax.global_norm(updates),
      lr=jnp.asarray(rate(state.step), jnp.float32),
    )
    metrics |= {f"grad_norm/{name}": optax.global_norm(part) for name, part in gradients.items()}
    return State(state.step + 1, trainable, optimizer), metrics

  return step


def in_turns(gradient: Callable, trainable: Any, examples: Any, turns: int):
  """((loss, metrics), gradients) of a batch in `turns` parts, one after another, for the memory of one part.

  All are sums over the parts, each of which divides by the counts of the whole batch: they are the batch's own, however
  its masked steps are spread. Example r goes to part r mod `turns`, so that none leaves its device.

  Args:
    gradient: (trainable, *examples, part) → ((loss, metrics), gradients), see `loss_fn`.
    examples: a tuple of trees, each array [b …]; `turns` divides b.
  """
  if turns == 1:
    return gradient(trainable, *examples, None)

  def split(x):
    parts = x.reshape(x.shape[0] // turns, turns, *x.shape[1:]).swapaxes(0, 1)  # [i b/i …]
    return nn.with_logical_constraint(parts, (None, "batch", *[None] * (x.ndim - 1)))

  def add(total, part):
    number, some = part
    told, gradients = gradient(trainable, *some, (number, turns))
    return jax.tree.map(jnp.add, total, gradients), told

  parts = (jnp.arange(turns), jax.tree.map(split, examples))
  total, told = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, trainable), parts)
  return jax.tree.map(lambda x: x.sum(axis=0), told), total


def new_state(transform: optax.GradientTransformation, trainable: dict) -> State:
  """The state before the first update (inside jit, or under eval_shape for its shapes)."""
  return State(jnp.zeros((), jnp.int32), trainable, transform.init(trainable))


def state_sharding(state: Any, mesh: Mesh, rule: sharding.Rule = sharding.PLAIN) -> State:
  """Where the state lives: parameters and moments by the one rule, counters everywhere."""
  return State(
    NamedSharding(mesh, P()),
    sharding.param_sharding(state.trainable, mesh, rule),
    sharding.param_sharding(state.optimizer, mesh, rule),
  )


def jit_step(step: Callable, mesh: Mesh, state: Any, frozen: Any, rule: sharding.Rule = sharding.PLAIN) -> Callable:
  """The step under jit with its shardings; the state is donated. Call or lower it inside `over(mesh)`."""
  batch = sharding.batch_sharding(mesh)
  where = state_sharding(state, mesh, rule)
  return jax.jit(
    step,
    in_shardings=(where, sharding.param_sharding(frozen, mesh, rule), batch, batch),
    out_shardings=(where, NamedSharding(mesh, P())),
    donate_argnums=0,
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
  rule: sharding.Rule = sharding.PLAIN,
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
