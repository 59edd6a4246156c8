"""The auxiliary losses of training from scratch: what they add, what they teach, and that the model stays as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers import jit_apply, random_observation, random_params, tiny

from configs import common, pretrain
from semanticvla_jax.data import statistics
from semanticvla_jax.models.semanticvla import build
from semanticvla_jax.tabletop import auxiliary_losses, tasks, training
from semanticvla_jax.train import inputs, step
from semanticvla_jax.types import Batch

B, G, V, N, M = 2, 3, 2, 64, 32
WEIGHTS = dict(alignment=0.1, naming=0.2, looks=0.1, displacement=0.3, aim=0.5, turn=0.2, rotation=0.4)


DENSE = common.OPENVLA | dict(coupler="single", mask="full")  # OpenVLA-OFT's parts
LOSSES = auxiliary_losses.AuxiliaryLosses(WEIGHTS)
_RANGE = np.array([[-1.0], [1.0]], np.float32)
STATISTICS = statistics.DatasetStatistics(*(statistics.compute(np.repeat(_RANGE, d, axis=1)) for d in (7, 8)), 2, 1)


@pytest.fixture(scope="module")
def parts():
  model = LOSSES.wrap(tiny())
  params = random_params(tiny())
  params["probe"] = {"kernel": jnp.zeros((3 * 32, 9)), "bias": jnp.full(9, 0.5)}
  params["probe_aim"] = {"kernel": jnp.zeros((3 * 32, 4)), "bias": jnp.zeros(4)}
  for name, width in (("dino", 16), ("siglip", 24)):
    params[f"probe_{name}"] = {"kernel": jnp.zeros((width, 5)), "bias": jnp.array([0.0, 0.0, 0.0, 1.0, 0.0])}
  rng = np.random.default_rng(0)
  where = jax.nn.one_hot(rng.integers(0, N, (B, 1 + G, V)), N)
  words = jnp.asarray(rng.integers(3, 200, (B, G, M)))
  mask, edges = jnp.arange(M)[None, None] < jnp.full((B, G, 1), 5), jnp.zeros((B, G, V, 2)).at[:, 0, :, 1].set(1.0)
  kinds = jnp.zeros((B, G), jnp.int32)
  targets = auxiliary_losses.Targets(where, words, mask, jnp.zeros((B, 9)), kinds, edges, edges[:, 0])
  return model, params, random_observation(tiny(), B), targets


def test_the_probes_are_all_that_is_added(parts):
  model, params, observation, _ = parts
  names = set(flatten_dict(jax.eval_shape(model.init, jax.random.key(0), observation)["params"], sep="/"))
  assert names - set(flatten_dict(random_params(tiny()), sep="/")) == {
    f"{name}/{leaf}" for name in ("probe", "probe_aim", "probe_dino", "probe_siglip") for leaf in ("kernel", "bias")
  }
  out = jax.jit(model.apply)({"params": params}, observation)
  bare = jax.jit(tiny().apply)({"params": LOSSES.strip(params)}, observation)
  np.testing.assert_allclose(out.actions, bare.actions, atol=1e-5)
  assert set(LOSSES.strip(params)) == set(random_params(tiny()))


def test_the_losses_and_what_they_teach(parts):
  model, params, observation, targets = parts

  @jax.jit
  def losses(params):
    out = model.apply({"params": params}, observation)
    return LOSSES.loss(model, params, out, {"l1_rotation": 0.0}, targets, LOSSES.counts(targets))

  total, each = losses(params)
  assert float(each["displacement"]) == float(each["turn"]) == pytest.approx(0.5)  # said 0.5, true 0
  assert float(each["aim"]) == pytest.approx(0.5)  # a cube turned by 22.5°: cosine 0, sine 1
  # Of three shapes none is likelier; one object of three is a cube turned by 22.5°, and said to lie straight.
  assert float(each["looks"]) == pytest.approx(np.log(3) + 2 * 1.0 / 3)
  assert float(total) == pytest.approx(sum(WEIGHTS[name] * float(x) for name, x in each.items()), rel=1e-5)
  gradients = jax.jit(jax.grad(lambda p: losses(p)[0]))(params)
  moved = {name for name, part in gradients.items() if any(np.abs(x).max() > 0 for x in jax.tree.leaves(part))}
  assert {"dino", "siglip", "text", "siglip_id_pruner", "probe", "probe_aim", "probe_dino", "probe_siglip"} <= moved
  assert "coupler" not in moved


def test_rotations_count_once_more(parts):
  model, params, observation, targets = parts
  batch = Batch(observation, jnp.full((B, 8, 7), 0.3), jnp.ones((B, 8), bool), targets)
  loss, metrics = jax.jit(lambda p: step.loss_fn(model, p, batch, jax.random.key(0), LOSSES))(params)
  taught = sum(WEIGHTS[name] * metrics[name] for name in WEIGHTS if name != "rotation")
  wanted = metrics["l1"] + taught + 0.4 * metrics["l1_rotation"]
  assert float(loss) == pytest.approx(float(wanted), rel=1e-5) and float(metrics["l1_rotation"]) > 0.01


def test_naming_scores_the_same_images_for_each_sentence(parts):
  model, params, _, targets = parts
  patches = jax.random.normal(jax.random.key(0), (B * V, N, 24))
  score = jit_apply(model, method="score")
  scores = score(params, patches, targets.words, targets.word_mask)
  assert scores.shape == (B * G * V, N, M)
  alone = score(params, patches, targets.words[:, 1:2], targets.word_mask[:, 1:2])
  np.testing.assert_allclose(scores.reshape(B, G, V, N, M)[:, 1], alone.reshape(B, V, N, M), atol=1e-5)


@pytest.fixture(scope="module")
def dense(parts):
  """The same of a model that shows all patches to its language model; its probe points evenly at first."""
  bare = tiny(**DENSE)
  params, others = random_params(bare), parts[1]
  params |= {name: others[name] for name in ("probe_dino", "probe_siglip")}
  params["probe"] = {"kernel": jnp.zeros((7 * 32, 9)), "bias": jnp.full(9, 0.5)}
  params["probe_aim"] = {"kernel": jnp.zeros((7 * 32, 4)), "bias": jnp.zeros(4)}
  params["probe_pointing"] = {"kernel": jnp.zeros((32, 1)), "bias": jnp.zeros(1)}
  return LOSSES.wrap(bare), params, random_observation(bare, B), parts[3]


def test_a_model_that_prunes_nothing_learns_what_words_mean_in_its_language_model(dense):
  model, params, observation, targets = dense
  weights = WEIGHTS | {"pointing": 1.0}
  taught = auxiliary_losses.AuxiliaryLosses(weights)

  @jax.jit
  def losses(params):
    out = model.apply({"params": params}, observation)
    return taught.loss(model, params, out, {"l1_rotation": 0.0}, targets, taught.counts(targets))

  (total, each), gradients = jax.jit(jax.value_and_grad(losses, has_aux=True))(params)
  assert float(each["pointing"]) == pytest.approx(np.log(N))  # at every patch of a view alike
  assert float(total) == pytest.approx(sum(weights[name] * float(x) for name, x in each.items()), rel=1e-5)
  assert set(each) == set(weights) - {"rotation"}
  moved = {name for name, part in gradients.items() if any(np.abs(x).max() > 0 for x in jax.tree.leaves(part))}
  assert moved == set(params) - {"coupler", "proprio_projector"}
  assert set(taught.strip(params)) == set(random_params(tiny(**DENSE)))


def test_a_visual_token_that_is_a_words_embedding_scores_one_there_and_padding_scores_nothing(dense):
  model, params, _, targets = dense
  table = params["llm"]["embed"]["embedding"]
  patches = jnp.zeros((B * V, N, 32)).at[:, 3].set(5 * table[targets.words[0, 0, 2]])
  scores = jit_apply(model, method="score")(params, patches, targets.words, targets.word_mask)
  assert scores.shape == (B * G * V, N, M)
  assert float(scores[0, 3, 2]) == pytest.approx(1, abs=1e-5) and float(jnp.abs(scores).max()) <= 1 + 1e-5
  assert not scores[:, :, 5:].any() and not scores[:, 4].any()


def test_only_for_training_from_scratch_on_the_experts_states():
  config = common.get_config("tiny")
  with config.unlocked():
    config.train.grounding = WEIGHTS
  with pytest.raises(ValueError, match="expected training from scratch on the expert's own states"):
    training.aux_loss(config)


def test_a_model_without_a_coupler_has_no_states_to_probe():
  config = pretrain.get_config()
  config.model.coupler = None
  with pytest.raises(ValueError, match="config.train.grounding: got weights with model.coupler=None"):
    training.aux_loss(config)


@pytest.mark.parametrize(
  "field",
  [
    {"siglip_pruner": None},
    {"siglip_pruner": "sa"},
    {"encoders": ("siglip",)},
    DENSE | {"encoders": ("siglip",)},
    DENSE | {"decoder_pruner": dict(block=1, keep=6, score="mean")},
    DENSE | {"compressor": dict(kind="resampler", side=3)},
  ],
)
def test_a_model_without_the_parts_that_losses_look_at_is_refused(field):
  config = pretrain.get_config()
  config.model.update(field)
  with pytest.raises(
    ValueError, match="config.train.grounding: got weights with model.encoders=.*expected both encoders"
  ):
    training.aux_loss(config)


@pytest.mark.parametrize("fields", [{}, DENSE])
def test_the_shapes_that_a_program_is_compiled_for_are_those_of_a_batch(fields):
  config = pretrain.get_config()
  config.data.batch_size = 2
  config.model.update(fields)
  model = build(config.model)
  make, _ = training.batches(config, model, inputs.load_tokenizers(config, model), STATISTICS)
  wanted = jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(make, 0).aux)
  assert wanted == jax.tree.map(lambda x: (x.shape, x.dtype), training.aux_loss(config).shapes(config, model))


@pytest.mark.slow
def test_a_model_without_a_text_tower_gets_its_other_sentences_as_prompts():
  config = pretrain.get_config("dense")
  config.data.batch_size = 2
  model = build(config.model)
  tokenizers = inputs.load_tokenizers(config, model)
  make, _ = training.batches(config, model, tokenizers, STATISTICS)
  batch = jax.jit(make)(0)
  prompts = {tuple(row) for row in tokenizers.prompt(tasks.INSTRUCTIONS)[0].tolist()}
  assert batch.observation.instruction is None
  assert {tuple(row) for row in np.asarray(batch.aux.words).reshape(-1, 32).tolist()} <= prompts


def test_alignment_prefers_scores_on_the_focus():
  focus = jnp.zeros((1, 1, 4)).at[0, 0, 2].set(1.0)
  on, off = (jnp.zeros((1, 4, 8)).at[0, i].set(0.5) for i in (2, 0))
  assert auxiliary_losses.alignment(on, focus) < auxiliary_losses.alignment(off, focus)
  assert float(auxiliary_losses.alignment(on, jnp.zeros((1, 1, 4)))) == 0.0
