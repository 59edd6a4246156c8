import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers import TINY, jit_apply, random_observation, random_params, tiny

from semanticvla_jax.models import semanticvla
from semanticvla_jax.models.fuser import SparseFuser
from semanticvla_jax.models.lora import LoRA
from semanticvla_jax.models.semanticvla import VARIANTS, abstract_params, build, dummy_observation

MODEL = tiny()
OPENVLA = dict(
  coupler=None,
  dino_pruner=None,
  siglip_pruner=None,
  dense_fuser=None,
  film=(),
  vision_layer="second_to_last",
  num_views=1,
  proprio_dim=None,
  mask="causal",
  chunk=1,
)


@pytest.fixture(scope="module")
def params():
  return random_params(MODEL)


@pytest.fixture(scope="module")
def forward():
  return jit_apply(MODEL)


def longer(observation, extra):
  pad = ((0, 0), (0, extra))
  return observation.replace(
    prompt=np.pad(observation.prompt, pad, constant_values=9), prompt_mask=np.pad(observation.prompt_mask, pad)
  )


def test_padding_changes_nothing(params, forward):
  observation = random_observation(MODEL, lengths=[8, 5])
  a, b = forward(params, observation), forward(params, longer(observation, 4))
  np.testing.assert_allclose(a.actions, b.actions, atol=2e-5)
  alone = jax.tree.map(lambda x: x[1:], observation)
  alone = alone.replace(prompt=alone.prompt[:, :5], prompt_mask=alone.prompt_mask[:, :5])
  np.testing.assert_allclose(forward(params, alone).actions, a.actions[1:], atol=2e-5)


def test_prefix_never_sees_the_action_block(params):
  """A longer chunk changes no state before the block; the block's own states do change."""
  observation = random_observation(MODEL)
  short, long = (jit_apply(tiny(chunk=k))(params, observation).intermediates for k in (8, 12))
  prefix = short["valid"].shape[1] - 8 * 3 - 1
  np.testing.assert_allclose(short["hidden"][:, :prefix], long["hidden"][:, :prefix], atol=1e-5)
  assert np.abs(short["hidden"][:, prefix] - long["hidden"][:, prefix]).max() > 1e-4


def test_permuting_views_permutes_their_tokens(params, forward):
  observation = random_observation(MODEL)
  swapped = observation.replace(images=observation.images[:, ::-1])
  a, b = (forward(params, o).intermediates["views"] for o in (observation, swapped))
  np.testing.assert_allclose(a.reshape(2, 2, -1), b.reshape(2, 2, -1)[:, ::-1], atol=1e-5)


def test_a_missing_view_is_as_if_the_model_had_one_less(params, forward):
  observation = random_observation(MODEL)
  black = np.concatenate([observation.images[:, :1], 0 * observation.images[:, :1], observation.images[:, 1:]], axis=1)
  three = tiny(num_views=3, optional_views=(1,))
  missing = jit_apply(three)(params, observation.replace(images=jnp.asarray(black)))
  np.testing.assert_allclose(missing.actions, forward(params, observation).actions, atol=2e-5)
  black[0, 1, 3, 4, 2] = 1  # of the first example it is there
  there = jit_apply(three)(params, observation.replace(images=jnp.asarray(black)))
  moved = np.abs(there.actions - missing.actions).max(axis=(1, 2))
  assert moved[0] > 1e-4 and moved[1] < 2e-5


def test_sequence_layout(params, forward):
  seen = forward(params, random_observation(MODEL)).intermediates
  visual = 2 * (TINY["cues"] + TINY["keep"])
  assert seen["sequence"].shape[1] == 1 + visual + 1 + 7 + 24 + 1
  np.testing.assert_array_equal(seen["sequence"][:, -25:-1], 0)
  np.testing.assert_array_equal(seen["allowed"][:, -25:, -25:], True)


def test_noise_only_in_training(params, forward):
  observation = random_observation(MODEL)
  train = jax.jit(lambda p, o, key: MODEL.apply({"params": p}, o, train=True, rngs={"noise": key}))
  quiet = forward(params, observation).intermediates["siglip_pruned"].similarity
  a, b, c = (train(params, observation, jax.random.key(s)).intermediates["siglip_pruned"].similarity for s in (0, 0, 1))
  np.testing.assert_array_equal(a, b)
  assert np.abs(a - c).max() > 0.01 and np.abs(a - quiet).max() > 0.01


def test_film_pool_all_differs_only_where_rows_are_padded(params):
  observation = random_observation(MODEL, lengths=[8, 5])
  a, b = (jit_apply(tiny(film_pool=p))(params, observation).actions for p in ("words", "all"))
  np.testing.assert_allclose(a[0], b[0], atol=1e-5)
  assert np.abs(a[1] - b[1]).max() > 1e-4


def test_gradients_reach_every_trainable_parameter():
  """Every adapter and full module gets a gradient, except what the released code cannot reach either."""
  model = LoRA(MODEL.clone(), 2, 4.0)
  params, observation = random_params(model), random_observation(MODEL, lengths=[8, 6])
  trainable = {k: x for k, x in flatten_dict(params, sep="/").items() if _is_trainable(k)}
  frozen = {k: x for k, x in flatten_dict(params, sep="/").items() if not _is_trainable(k)}

  def loss(trainable):
    from flax.traverse_util import unflatten_dict

    actions = model.apply({"params": unflatten_dict(trainable | frozen, sep="/")}, observation).actions
    return jnp.abs(actions).mean()

  gradients = jax.jit(jax.grad(loss))(trainable)
  dead = {name for name, g in gradients.items() if not np.abs(g).max() > 0}
  assert dead == set(), sorted(dead)


def _is_trainable(name):
  parts = ("lora_", "film/", "pruner/", "dense_fuser", "sparse_fuser", "proprio_projector", "coupler")
  return any(part in name for part in parts)


def test_bfloat16_stays_near_float32(params, forward):
  """Eight bits of mantissa through nine layers: actions move by a few percent of their spread, not more."""
  observation = random_observation(MODEL, batch=8)
  exact = forward(params, observation).actions
  rounded = jit_apply(tiny(dtype="bfloat16"))(params, observation).actions
  assert rounded.dtype == jnp.float32
  assert np.median(np.abs(exact - rounded)) < 0.05 * exact.std()


def test_remat_and_unrolled_layers_change_nothing(params, forward):
  from semanticvla_jax.models.llama import unstack_layers

  observation = random_observation(MODEL)
  expected = forward(params, observation).actions
  np.testing.assert_allclose(jit_apply(tiny(remat="full"))(params, observation).actions, expected, atol=1e-5)
  np.testing.assert_allclose(
    jit_apply(tiny(scan=False))(unstack_layers(params), observation).actions, expected, atol=1e-5
  )


@pytest.mark.slow
def test_a_loop_over_encoder_blocks_changes_nothing():
  """The same parameters, answers and gradients, adapters and rematerialisation included."""
  pairs = dict(dense_fuser=((1, 1),))  # two blocks before it and two behind
  apart, looped = tiny(**pairs), tiny(**pairs, scan_encoders=True, remat="full")
  params, observation = random_params(LoRA(apart, 2, 4.0)), random_observation(apart)
  shapes = jax.tree.map(jnp.shape, params)
  assert shapes == jax.tree.map(jnp.shape, random_params(LoRA(looped, 2, 4.0)))

  def both(model):
    loss = lambda p: jnp.square(LoRA(model, 2, 4.0).apply({"params": p}, observation).actions).mean()  # noqa: E731
    return jax.jit(jax.value_and_grad(loss))(params)

  (value, gradient), (expected, wanted) = both(looped), both(apart)
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, wanted)
  scans = str(jax.make_jaxpr(lambda p: LoRA(looped, 2, 4.0).apply({"params": p}, observation).actions)(params))
  assert scans.count("scan[") == 4  # SigLIP in two pieces, DINOv2 in one and its last block, decoder


class _Weighted(SparseFuser):
  weights: np.ndarray | None = None


def test_shapes_of_an_equal_model_are_not_computed_again():
  first, second = (build(TINY | {"num_views": 1}) for _ in range(2))
  abstract_params(first, dummy_observation(first)).clear()  # the caller's own
  before = semanticvla._abstract_params.cache_info()
  assert "llm" in abstract_params(second, dummy_observation(second))
  abstract_params(second, dummy_observation(second, prompt=9))
  after = semanticvla._abstract_params.cache_info()
  assert (after.hits - before.hits, after.misses - before.misses) == (1, 1)
  unhashable = first.clone(sparse_fuser=_Weighted(first.sparse_fuser.width, weights=np.ones(3)))
  assert abstract_params(unhashable, dummy_observation(first)) == abstract_params(first, dummy_observation(first))


def test_unread_intermediates_are_not_computed(params):
  """Under jit, asking for actions alone compiles to fewer operations than asking for everything."""
  observation = random_observation(MODEL)
  few = jax.jit(lambda p, o: MODEL.apply({"params": p}, o).actions).lower(params, observation).compile()
  many = jit_apply(MODEL).lower(params, observation).compile()
  assert few.cost_analysis()["flops"] < many.cost_analysis()["flops"]


def test_greedy_decoding_with_a_cache_equals_teacher_forcing():
  model = tiny(**OPENVLA)
  params, observation = random_params(model), random_observation(tiny(**OPENVLA), lengths=[8, 6])
  ids, logits, _ = jax.jit(lambda p, o: model.apply({"params": p}, o, method="generate"))(params, observation)
  np.testing.assert_array_equal(np.argmax(logits, -1), ids)
  n = np.asarray(observation.prompt_mask.sum(-1))
  prompt, mask = np.zeros((2, 8 + 7), np.int32), np.zeros((2, 8 + 7), bool)
  for row in range(2):
    prompt[row, : n[row] + 7] = [*observation.prompt[row, : n[row]], *ids[row]]
    mask[row, : n[row] + 7] = True
  forced, _ = jax.jit(lambda p, o: model.apply({"params": p}, o, method="logits"))(
    params, observation.replace(prompt=prompt, prompt_mask=mask)
  )
  for row in range(2):
    np.testing.assert_allclose(forced[row, n[row] - 1 : n[row] + 6], logits[row], atol=2e-4)


def test_observations_that_do_not_fit(params):
  observation = dummy_observation(MODEL)

  def apply(**changes):
    return MODEL.apply({"params": params}, observation.replace(**changes))

  with pytest.raises(ValueError, match="got proprioception of width 14, expected 8.*use the config of this robot"):
    apply(proprio=jnp.zeros((1, 14)))
  with pytest.raises(ValueError, match="got 3 views, expected 2"):
    apply(images=jnp.zeros((1, 3, 32, 32, 3), jnp.uint8))
  with pytest.raises(ValueError, match="got images of 28×28 pixels, expected 32×32"):
    apply(images=jnp.zeros((1, 2, 28, 28, 3), jnp.uint8))
  with pytest.raises(ValueError, match="an instruction of 40 tokens; expected at most the tower's 32 positions"):
    apply(instruction=jnp.zeros((1, 40), jnp.int32), instruction_mask=jnp.ones((1, 40), bool))
  with pytest.raises(ValueError, match="got no instruction tokens"):
    apply(instruction=None, instruction_mask=None)


def test_remat_can_be_unset_by_name():
  assert build(TINY | dict(remat="none")).llm.remat is None and build(TINY | dict(remat="dots")).llm.remat == "dots"


ROW = VARIANTS["tiny"]
NO_TEXT = {name: value for name, value in ROW.items() if name != "text"}
NO_DEPTH = {name: value for name, value in ROW["llm"].items() if name != "depth"}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(kepe=3), "got unknown field 'kepe'.*did you mean 'keep'"),
    (dict(variant="8b"), "got variant '8b'; expected one of .*; set model.variant"),
    (dict(variant=NO_TEXT), r"got a variant without \['text'\]; expected .*; copy a row"),
    (dict(variant=ROW | dict(llm=NO_DEPTH)), r"got variant.llm without \['depth'\].*; copy a row"),
    (dict(variant=ROW | dict(llm=ROW["llm"] | dict(heads=2))), r"got variant.llm .* unknown \['heads'\].*; copy a row"),
    (dict(variant=ROW | dict(patch=0)), "got variant.patch=0; expected a whole number from 1; copy a row"),
    (dict(encoders=("clip",)), r"got encoders=\('clip',\); expected one or both of .*; one of them is written"),
    (dict(encoders=("siglip", "dino")), "got encoders=.*in this order; .*DINOv2's channels come first"),
    (dict(encoders=()), r"got encoders=\(\); expected one or both"),
    (dict(encoders="siglip"), "got encoders='siglip'; expected one or both"),
    (dict(film=("dinoo",)), r"got film=\('dinoo',\); expected some of the encoders .*; \(\) leaves FiLM out"),
    (dict(film="dino"), "got film='dino'; expected some of the encoders"),
    (dict(encoders=("siglip",), dense_fuser=None), r"got film=\('dino',\); expected some of .* \('siglip',\)"),
    (dict(encoders=("siglip",), film=()), "got dense_fuser='variant'; expected None beside the one encoder.*; set"),
    (dict(dense_fuser="none"), "got dense_fuser='none'; expected 'variant', None or pairs .*; None "),
    (dict(dense_fuser=(1, 2)), r"got dense_fuser=\(1, 2\); expected 'variant', None or pairs"),
    (dict(dense_fuser=((0, 9),)), "dense fuser: got blocks .*; expected rising numbers .*; set model.dense_fuser"),
    (dict(dino_pruner="both"), "got dino_pruner='both'; expected one of .*; set model.dino_pruner"),
    (dict(mask="bidirectional"), "got mask='bidirectional'; expected one of .*; set model.mask"),
    (dict(coupler="mlp"), "got coupler='mlp'; expected one of .*; set model.coupler"),
    (dict(action_dim=8), "got action_dim 8; expected a multiple of 7 .*; use the 'single' coupler"),
    (dict(anchor_rule="best"), "got anchor_rule='best'; expected one of .*; set model.anchor_rule"),
    (dict(remat="some"), "got remat='some'; expected one of .*; set model.remat"),
    (dict(dtype="float8"), "got dtype='float8'; expected one of .*; set model.dtype"),
    (dict(keep=0), "got keep=0; expected a whole number from 1; set model.keep"),
    (dict(keep=-1), "got keep=-1; expected a whole number from 1; set model.keep"),
    (dict(keep=8.0), "got keep=8.0; expected a whole number from 1"),
    (dict(cues=-1), "got cues=-1; expected a whole number from 0; set model.cues"),
    (dict(num_views=0), "got num_views=0; expected a whole number from 1; set model.num_views"),
    (dict(chunk=0), "got chunk=0; expected a whole number from 1; set model.chunk"),
    (dict(proprio_dim=0), "got proprio_dim=0; expected a whole number from 1, or None; None leaves"),
    (dict(temperature=0), "got temperature=0; expected a number above 0; small ones"),
    (dict(similarity_noise=-0.1), "got similarity_noise=-0.1; expected a number from 0; set"),
  ],
)
def test_configs_that_do_not_build(changes, message):
  with pytest.raises(ValueError, match=message):
    build(TINY | changes)


def test_more_patches_than_there_are():
  with pytest.raises(
    ValueError, match=r"got 65 anchors \(patches\) to keep of 64; expected 64 or fewer; lower model.keep"
  ):
    random_params(build(TINY | dict(keep=65)))
