"""What a policy runs: the serving layout, sentences remembered on the device, prompts of several lengths."""

import jax
import numpy as np
import policies
import pytest
from flax.traverse_util import flatten_dict
from helpers import TINY, jit_apply, random_observation, random_params, tiny

from semanticvla_jax import policy_folder
from semanticvla_jax.data import statistics, text
from semanticvla_jax.models import serving
from semanticvla_jax.models.semanticvla import build
from semanticvla_jax.policy import Policy, check_params
from semanticvla_jax.train import flops
from semanticvla_jax.types import Observation

OFT = dict(dino_pruner=None, siglip_pruner=None, dense_fuser=None, film=(), coupler="single", mask="full")
LONG = "pick up the green ball and place it in the blue bowl"


@pytest.fixture(scope="module")
def ready():
  return policies.policy(batch_sizes=(1, 3), prompt_lengths=(24,), remember=2)


def images_alone(observation):
  return Observation(observation.images, observation.proprio, None, None)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("fields", [{}, OFT | {"vision_layer": "second_to_last"}], ids=["semanticvla", "oft"])
def test_the_serving_layout_gives_the_same_actions(fields, platform):
  """Layers apart, fused products and a last layer for the read positions alone: equal to rounding, names as asked."""
  model, served = tiny(**fields), build(TINY | fields | serving.layout(platform))
  assert served.dino.multiple == (8 if platform == "gpu" else 1)
  params, observation = random_params(model), random_observation(model)
  laid_out = serving.lay_out(flatten_dict(params, sep="/"))
  shapes = jax.eval_shape(served.init, {"params": jax.random.key(0), "noise": jax.random.key(1)}, observation)["params"]
  check_params(laid_out, {name: x.shape for name, x in flatten_dict(shapes, sep="/").items()})
  expected, got = jit_apply(model)(params, observation), jit_apply(served)(laid_out, observation)
  np.testing.assert_allclose(got.actions, expected.actions, atol=1e-5)
  np.testing.assert_allclose(got.intermediates["hidden"], expected.intermediates["hidden"], atol=2e-5)
  assert "qkv_proj" in laid_out["llm"]["layers_0"]["attn"] and "layers" not in laid_out["llm"]


def test_the_last_decoder_layer_is_all_that_the_layout_saves():
  """FLOPs by where they are: layers but the last cost what they cost stacked, the last less, all else the same."""

  def scopes(fields):
    model = build(TINY | fields)
    params = jax.eval_shape(lambda: model.init({"params": jax.random.key(0), "noise": jax.random.key(1)}, observation))
    found = flops.by_scope(lambda p, o: model.apply(p, o).actions, params, observation)
    layers = {name: n for name, n in found.items() if "/layers" in name}
    return layers, sum(found.values()) - sum(layers.values())

  observation = random_observation(tiny())
  (stacked, others), (apart, same) = scopes({}), scopes(serving.layout("cpu"))
  first = sum(n for name, n in apart.items() if "layers_0" in name)
  assert others == same and 2 * first == sum(stacked.values())
  assert sum(apart.values()) - first < 0.8 * first


def test_on_a_gpu_the_longest_prompt_is_padded_to_whole_eights():
  of = lambda **fields: policies.policy(  # noqa: E731
    config=policies.CONFIG | {"model": TINY | {"chunk": 9} | fields}, batch_sizes=(1,)
  )
  plain, filled = of(), of(token_multiple=8)
  (length,) = filled.metadata["prompt_lengths"]
  assert length > filled.tokenizers.prompt_length and (length + filled._other_positions) % 8 == 0
  assert plain.metadata["prompt_lengths"] == [plain.tokenizers.prompt_length]
  seen = policies.observation()
  np.testing.assert_allclose(filled.infer(seen)["actions"], plain.infer(seen)["actions"], atol=1e-5)


def test_a_layout_changes_no_parameter():
  params = random_params(tiny())
  laid_out = serving.lay_out(flatten_dict(params, sep="/"))
  layer, first = params["llm"]["layers"], laid_out["llm"]["layers_1"]
  for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
    np.testing.assert_array_equal(first["attn"]["qkv_proj"]["kernel"][:, i], layer["attn"][name]["kernel"][1])
  np.testing.assert_array_equal(first["mlp"]["gate_up_proj"]["kernel"][:, 1], layer["mlp"]["up_proj"]["kernel"][1])
  block = "encoderblock_2", "MultiHeadDotProductAttention_0"
  old, new = (tree["dino"]["Transformer"][block[0]][block[1]] for tree in (params, laid_out))
  for i, name in enumerate(("query", "key", "value")):
    np.testing.assert_array_equal(new["qkv"]["bias"][i], old[name]["bias"])
  assert sum(x.size for x in jax.tree.leaves(laid_out)) == sum(x.size for x in jax.tree.leaves(params))


def test_a_sentence_computed_before_gives_the_same_actions():
  model = tiny()
  params, observation = random_params(model), random_observation(model)
  sentence = jax.jit(lambda p, x: model.apply({"params": p}, x, True, method="sentence"))(params, observation)
  assert sentence.condition["dino"].shape == (2, 4, 2, 16) and sentence.projected["siglip_id_pruner"].shape[-1] == 24
  act = jax.jit(lambda p, s, x: model.apply({"params": p}, x, sentence=s).actions)
  got = act(params, sentence, images_alone(observation))
  np.testing.assert_allclose(got, jit_apply(model)(params, observation).actions, atol=1e-5)


def test_blocks_that_never_run_have_no_modulation():
  """An encoder whose second-to-last block's patches are taken has no FiLM in the last."""
  model = tiny(vision_layer="second_to_last", dense_fuser=None)
  run = lambda p, x: model.apply({"params": p}, x, True, method="sentence")  # noqa: E731
  assert jax.eval_shape(run, random_params(model), random_observation(model)).condition["dino"].shape == (2, 3, 2, 16)


def test_nothing_of_the_sentence_is_computed_again(ready):
  """The program of a call does not read the text tower, the words' projection, or FiLM."""
  used = jax.make_jaxpr(ready.inference._programs["actions"])
  observation = ready.observe([policies.observation()])
  sentence = ready.inference._sentence(ready.params, [x[:1] for x in ready.words([LONG])], 40)
  jaxpr = used(ready.params, sentence, observation.images, observation.proprio).jaxpr
  names = [*flatten_dict(ready.params, sep="/")]
  read = {id(v) for equation in jaxpr.eqns for v in equation.invars}
  unread = {name for name, v in zip(sorted(names), jaxpr.invars) if id(v) not in read}
  expected = {name for name in names if name.startswith("text/") or "/film/" in name or "text_projector" in name}
  assert expected <= unread


def test_sentences_are_remembered_on_the_device_up_to_a_bound(ready, monkeypatch):
  calls, program = [], ready.executables["sentence", 1, 24]

  def count(*args):
    calls.append(1)
    return program(*args)

  monkeypatch.setitem(ready.inference.executables, ("sentence", 1, 24), count)
  for color in ("red", "blue", "red", "green", "red", "blue"):
    ready.infer(policies.observation(prompt=f"pick up the {color} cube"))
  assert len(calls) == 4, "red, blue, green, and blue again, which green had pushed out"
  assert len(ready.inference._sentences) == 2


def test_other_parameters_forget_the_sentences(ready):
  other = policies.policy(seed=1)
  other.inference = ready.inference
  seen = policies.observation()
  first, second = ready.infer(seen)["actions"], other.infer(seen)["actions"]
  alone = policies.policy(seed=1, batch_sizes=(1,), prompt_lengths=(24,))
  np.testing.assert_allclose(second, alone.infer(seen)["actions"], atol=1e-5)
  assert np.abs(first - second).max() > 1e-3
  np.testing.assert_array_equal(ready.infer(seen)["actions"], first)


def test_a_short_sentence_runs_at_a_short_length(ready):
  """The sequence's length is a multiple of eight, and the actions are those of the longest length."""
  short, longest = ready.metadata["prompt_lengths"]
  whole = policies.policy(batch_sizes=(1,))
  for prompt in ("pick up the red cube", LONG):
    seen = policies.observation(prompt=prompt)
    np.testing.assert_allclose(ready.infer(seen)["actions"], whole.infer(seen)["actions"], atol=1e-5)
  assert 24 <= short < longest == 40
  sequence = jit_apply(ready.model)(ready.params, ready.observe([seen])).intermediates["sequence"].shape[1]
  assert (sequence - longest + short) % 8 == 0


def test_a_batch_of_several_sentences_is_that_of_each(ready):
  seen = [policies.observation(i, prompt=("pick up the red cube", LONG)[i % 2]) for i in range(3)]
  together = [one["actions"] for one in ready.infer_batch(seen)]
  np.testing.assert_allclose(together, [ready.infer(one)["actions"] for one in seen], atol=1e-5)


def test_warming_compiles_for_the_sentences_there_are():
  policy = policies.policy(batch_sizes=(1,))
  policy.warm(["pick up the red cube"])
  assert len(policy.metadata["prompt_lengths"]) == 2 and len(policy.inference._sentences) == 1
  with pytest.raises(ValueError, match="not compiled"):
    policies.policy().warm(["pick up the red cube"])
  with pytest.raises(ValueError, match="a prompt length of 99; expected at most 40"):
    policies.policy(batch_sizes=(1,), prompt_lengths=(99,))
  for remember in (-1, 2.5, True, "all"):
    with pytest.raises(ValueError, match="remember=.*; expected a number of sentences, 0 or more"):
      policies.policy(remember=remember)
  with pytest.raises(ValueError, match=r"prompt_lengths=\(0,\); expected a tuple of positive integers"):
    policies.policy(prompt_lengths=(0,))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_weights_of_eight_bits(kind, tmp_path):
  """The decoder's kernels alone are rounded, by at most half a step of their type; actions move little."""
  folder = tmp_path / "policy"
  entries = {"tabletop_place": statistics.to_openvla(policies.stats())}
  policy_folder.save_policy(
    folder, random_params(tiny()), config=policies.CONFIG, statistics=entries, tokenizers=text.EMBEDDED
  )
  whole, rounded = Policy.load(folder), Policy.load(folder, weights=kind)
  ours, theirs = (flatten_dict(policy.params, sep="/") for policy in (rounded, whole))
  changed = {name for name in theirs if ours[name].dtype.itemsize == 1}
  assert len(changed) == 2 * 4 and all(name.startswith("llm/layers_") for name in changed)
  for name in changed:
    kernel, scale = np.asarray(theirs[name]), np.asarray(ours[name.replace("/kernel", "/scale")])
    step = scale * np.ones_like(kernel)  # of int8; of fp8 an eighth of the power of two below, at least 2^-9
    if kind == "fp8":
      step *= np.maximum(2.0 ** np.floor(np.log2(np.maximum(np.abs(kernel / scale), 1e-9))) / 8, 2.0**-9)
    assert (np.abs(np.asarray(ours[name], np.float32) * scale - kernel) <= 0.501 * step).all()
  for name in theirs.keys() - changed:
    np.testing.assert_array_equal(ours[name], theirs[name])
  seen = policies.observation()
  a, b = (policy.device_step(policy.observe([seen])) for policy in (whole, rounded))
  assert 0 < np.std(a - b) < 0.1 * np.std(a) and rounded.metadata["weights"] == kind


def test_unknown_weights_and_attention_are_refused(tmp_path):
  folder = tmp_path / "policy"
  entries = {"tabletop_place": statistics.to_openvla(policies.stats())}
  policy_folder.save_policy(
    folder, random_params(tiny()), config=policies.CONFIG, statistics=entries, tokenizers=text.EMBEDDED
  )
  with pytest.raises(ValueError, match="weights='int4'; expected one of"):
    Policy.load(folder, weights="int4")
  with pytest.raises(ValueError, match="attention: got 'triton' on cpu; expected a GPU"):
    Policy.load(folder, attention="triton")
