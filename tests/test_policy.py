"""A policy is its model, its statistics and its words: nothing is lost between an observation dict and an action."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import policies
import pytest
from helpers import jit_apply, random_params, tiny

from semanticvla_jax import observation_dict, policy, policy_folder, preparation
from semanticvla_jax.data import gripper, images, statistics, text
from semanticvla_jax.policy import Policy
from semanticvla_jax.types import Observation

SENTENCES = ("pick up the red cube", "pick up the green ball and place it in the blue bowl")


@pytest.fixture(scope="module")
def ready():
  return policies.policy(batch_sizes=(1, 4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Two saved policies: plain, and with adapters."""
  root = tmp_path_factory.mktemp("policies")
  entries = {"tabletop_place": statistics.to_openvla(policies.stats())}
  common = dict(statistics=entries, tokenizers=text.EMBEDDED)
  policy_folder.save_policy(root / "plain", random_params(tiny()), config=policies.CONFIG, **common)
  config = policies.CONFIG | {"lora": {"rank": policies.RANK, "alpha": policies.ALPHA, "targets": "release"}}
  policy_folder.save_policy(root / "adapted", policies.adapted()[1], config=config, **common)
  return root


@pytest.fixture(scope="module")
def loaded(folder):
  return Policy.load(folder / "plain")


def runs_like(ready, other):
  """`other`, of an equal model, with the programs compiled for `ready`: compiling is what these tests spend time on."""
  assert other.model == ready.model
  other.inference = ready.inference
  return other


def test_infer_is_the_model_between_the_statistics(ready):
  seen = policies.observation()
  result = ready.infer(seen)
  proprio = statistics.normalize(seen["observation/state"][None], policies.stats().proprio)
  pictures = np.stack([seen["observation/image"], seen["observation/wrist_image"]])[None]
  words = ready.tokenizers.prompt([seen["prompt"]]), ready.tokenizers.instruction([seen["prompt"]])
  observation = jax.tree.map(jnp.asarray, Observation(pictures, proprio, *words[0], *words[1]))
  raw = np.asarray(jit_apply(ready.model)(ready.params, observation).actions)[0]
  expected = statistics.unnormalize(raw, policies.stats().action)
  expected[:, 6] = np.where(expected[:, 6] > 0.5, -1, 1)
  np.testing.assert_allclose(result["actions"], expected, atol=1e-4)
  assert result["actions"].shape == (8, 7) and result["actions"].dtype == np.float32
  timing = result["policy_timing"]
  assert 0 < timing["infer_ms"] and timing["prepare_ms"] + timing["infer_ms"] <= timing["total_ms"]


def test_every_name_of_a_part_means_the_same(ready):
  seen = policies.observation()
  expected = ready.infer(seen)["actions"]
  values = dict(zip(("image", "wrist_image", "state", "instruction"), seen.values()))
  for part, aliases in observation_dict.ALIASES.items():
    if part in values:
      for alias in aliases:
        renamed = {observation_dict.ALIASES[other][0]: value for other, value in values.items() if other != part}
        np.testing.assert_array_equal(ready.infer(renamed | {alias: values[part]})["actions"], expected)
  oft = dict(zip(("full_image", "wrist_image", "state", "task_description"), seen.values()))
  np.testing.assert_array_equal(ready.infer(oft | {"unnorm_key": "other"})["actions"], expected)
  flat = [alias for aliases in observation_dict.ALIASES.values() for alias in aliases]
  assert len(flat) == len(set(flat)), "an alias means one thing"


def test_each_part_of_an_observation_matters(ready):
  seen = policies.observation()
  base = ready.infer(seen)["actions"]
  other = policies.observation(1, prompt=SENTENCES[1])
  for key in seen:
    assert np.abs(ready.infer(seen | {key: other[key]})["actions"] - base).max() > 1e-4, key


def test_a_batch_gives_what_each_would_get_alone(ready):
  seen = [policies.observation(i, prompt=SENTENCES[i % 2]) for i in range(6)]
  together = [result["actions"] for result in ready.infer_batch(seen)]
  alone = [ready.infer(one)["actions"] for one in seen]
  assert len(together) == 6
  np.testing.assert_allclose(together, alone, atol=1e-4)
  assert np.abs(alone[0] - alone[2]).max() > 1e-3


@pytest.mark.parametrize("mode", ["bounds_q99", "bounds"])
def test_normalization_inside_jit_is_that_of_the_data(mode):
  stats = policies.stats()
  still = stats.proprio.replace(min=stats.proprio.min.copy(), max=stats.proprio.max.copy())
  still.min[3] = still.max[3]
  values = np.random.default_rng(3).normal(0, 1, (50, 8)).astype(np.float32)
  normalize = jax.jit(lambda x, stats: statistics.normalize(x, stats, mode=mode))  # bounds may be arguments, too
  inside = normalize(values, still)
  assert isinstance(inside, jax.Array) and isinstance(statistics.normalize(values, still, mode=mode), np.ndarray)
  np.testing.assert_allclose(inside, statistics.normalize(values, still, mode=mode), atol=1e-6)
  assert not np.any(inside[:, 3]) and np.any(inside[:, 2])
  back = jax.jit(lambda x: statistics.unnormalize(x, stats.action, mode=mode))(values[:, :7])
  np.testing.assert_allclose(back, statistics.unnormalize(values[:, :7], stats.action, mode=mode), atol=1e-6)


@pytest.mark.parametrize("size, area", [(32, 0.9), (64, 0.5)])
def test_the_center_crop_inside_jit_is_that_of_the_data(size, area):
  pictures = np.random.default_rng(0).integers(0, 256, (2, 3, size, size, 3)).astype(np.uint8)
  inside = np.asarray(jax.jit(lambda x: images.center_crop(x, area))(pictures)).astype(int)
  expected = images.center_crop(pictures, area)
  assert isinstance(expected, np.ndarray)
  np.testing.assert_array_equal(expected[1, 2], images.center_crop(pictures[1, 2], area))
  difference = np.abs(inside - expected)
  assert difference.max() <= 1 and np.mean(difference > 0) < 1e-3
  assert np.abs(inside - pictures).mean() > 10


def test_a_gripper_is_a_command_or_raw(ready):
  raw = np.array([[0.5, -2.0, 0.9], [0.1, 0.3, 0.2]], np.float32)
  command = gripper.to_commands(raw, np.array([True, True, False]))
  np.testing.assert_allclose(command, [[0.5, -2, -1], [0.1, 0.3, 1]], rtol=1e-6)
  np.testing.assert_array_equal(gripper.to_commands(raw, np.ones(3, bool)), raw)
  stored = np.array([-1, -0.2, 0.3, 1, 2], np.float32)
  for openings in (gripper.to_opening(stored), jax.jit(gripper.to_opening)(stored)):
    np.testing.assert_array_equal(openings, 1 - np.clip(stored, 0, 1))
  seen = policies.observation()
  learned = runs_like(ready, policies.policy(gripper="raw")).infer(seen)["actions"]
  command = ready.infer(seen)["actions"]
  np.testing.assert_allclose(learned[:, :6], command[:, :6], atol=1e-5)
  np.testing.assert_array_equal(command[:, 6], np.where(learned[:, 6] > 0.5, -1, 1))
  assert np.any(learned[:, 6] != command[:, 6])


def test_images_are_prepared_as_the_config_says():
  config = policies.CONFIG | {"data": {"normalisation": "bounds", "crop_area": 0.9, "jpeg_quality": 95}}
  cropping = policies.policy(config=config)
  seen = policies.observation(size=48)
  found = cropping.observe([seen])
  for view, key in enumerate(("observation/image", "observation/wrist_image")):
    expected = images.prepare(seen[key], 32, jpeg_quality=95, crop_area=0.9)
    np.testing.assert_array_equal(found.images[0, view], expected)
  expected = statistics.normalize(seen["observation/state"], policies.stats().proprio, mode="bounds")
  np.testing.assert_array_equal(found.proprio[0], expected)
  plain = policies.policy().observe([policies.observation()])
  np.testing.assert_array_equal(plain.images[0, 0], policies.observation()["observation/image"])


def test_jpegs_are_decoded_as_the_config_says():
  config = policies.CONFIG | {"data": policies.DATA | {"jpeg_quality": 60, "dct": "fast"}}
  fast, seen = policies.policy(config=config), policies.observation()
  expected = [images.jpeg_round_trip(seen["observation/image"], 60, dct) for dct in images.DCTS]
  np.testing.assert_array_equal(fast.observe([seen]).images[0, 0], expected[1])
  assert np.any(expected[0] != expected[1]) and fast.metadata["dct"] == "fast"
  with pytest.raises(ValueError, match="dct='slow'; expected one of"):
    policies.policy(config=policies.CONFIG | {"data": {"dct": "slow"}})


def test_the_text_of_the_pruner_is_the_trained_one_unless_evaluation_has_its_own(ready):
  for data, written in (
    ({}, "question"),
    ({"pruner_text": "prompt"}, "prompt"),
    ({"pruner_text": "question", "pruner_text_eval": "prompt"}, "prompt"),
    ({"pruner_text": "prompt", "pruner_text_eval": None}, "prompt"),
  ):
    words = policy._tokenizers(text.EMBEDDED, {"data": data}, ready.bare)
    assert words.pruner_text == written, data
  assert ready.metadata["pruner_text"] == "question"


def test_a_saved_policy_acts_like_the_one_in_memory(folder, ready, loaded, caplog):
  seen = policies.observation()
  np.testing.assert_allclose(loaded.infer(seen)["actions"], ready.infer(seen)["actions"], atol=1e-5)
  facts = loaded.metadata
  assert facts["policy_hash"] == policy_folder.policy_hash(folder / "plain")
  assert (facts["dataset"], facts["chunk"], facts["image_size"]) == ("tabletop_place", 8, 32)
  assert (loaded.tokenizers.prompt_length, loaded.tokenizers.instruction_length) == (40, 32)
  assert "bfloat16" not in caplog.text
  half = Policy.load(folder / "plain", dtype="bfloat16", batch_sizes=())
  assert "load with dtype='float32'" in caplog.text  # this test runs on a CPU
  assert half.metadata["dtype"] == "bfloat16" and jax.tree.leaves(half.params)[0].dtype == jnp.bfloat16


def test_adapters_merged_and_kept_act_the_same(folder, loaded):
  seen = policies.observation()
  merged = runs_like(loaded, Policy.load(folder / "adapted", batch_sizes=()))
  kept = Policy.load(folder / "adapted", adapters="keep")
  assert "lora_a" in str(jax.tree.structure(kept.params)) and "lora_a" not in str(jax.tree.structure(merged.params))
  np.testing.assert_allclose(merged.infer(seen)["actions"], kept.infer(seen)["actions"], atol=2e-4)
  layer = merged.params["llm"]["layers_0"]["attn"]["qkv_proj"]["kernel"][:, 0]
  assert np.abs(layer - kept.params["llm"]["layers"]["attn"]["q_proj"]["kernel"][0]).max() > 1e-2


def test_a_variant_keeps_the_parameters(ready):
  base = policies.policy()
  other = base.variant(anchor_rule="centre")
  assert other.params is base.params and other.metadata["variant"] == {"anchor_rule": "centre"}
  observation = jax.tree.map(jnp.asarray, ready.observe([policies.observation()]))

  def anchors(one):
    return jax.jit(lambda p, x: one.model.apply({"params": p}, x).intermediates["siglip_pruned"].kept)

  kept = [anchors(one)(one.params, observation) for one in (base, other)]
  assert np.any(kept[0] != kept[1]) and np.all(kept[1][0] == kept[1][1])


def test_a_blind_policy_sees_nothing_and_still_hears_and_feels(ready):
  blind, one = ready.blind(), policies.observation(0)
  other = {**one, **{name: policies.observation(1)[name] for name in ("observation/image", "observation/wrist_image")}}
  act = lambda policy, seen: policy.infer(seen)["actions"]  # noqa: E731
  np.testing.assert_array_equal(act(blind, one), act(blind, other))
  assert (act(ready, one) != act(ready, other)).any()
  assert (act(blind, one) != act(blind, one | {"prompt": "pick up the blue ball"})).any()
  assert (act(blind, one) != act(blind, one | {"observation/state": np.ones(8, np.float32)})).any()
  assert blind.metadata["variant"] == {"images": "grey"} and "variant" not in ready.metadata


def test_observations_that_do_not_fit_say_why(ready):
  seen = policies.observation()
  without = {key: value for key, value in seen.items() if key != "observation/wrist_image"}
  with pytest.raises(ValueError, match="lacks 'wrist_image'.*did you mean to rename 'observation/wrist_images'"):
    ready.infer(without | {"observation/wrist_images": seen["observation/wrist_image"]})
  with pytest.raises(ValueError, match=r"ambiguous: got \['prompt', 'instruction'\]"):
    ready.infer(seen | {"instruction": "push"})
  with pytest.raises(ValueError, match=r"image: got float32\[32, 32, 3\]; expected uint8"):
    ready.infer(seen | {"observation/image": np.zeros((32, 32, 3), np.float32)})
  with pytest.raises(ValueError, match="expected 8 finite numbers"):
    ready.infer(seen | {"observation/state": np.full(8, np.nan)})
  with pytest.raises(ValueError, match="expected a sentence"):
    ready.infer(seen | {"prompt": " "})
  with pytest.raises(ValueError, match="does not fit"):
    ready.infer(seen | {"prompt": "pick up " + "the red cube " * 20})
  with pytest.raises(ValueError, match="not compiled"):
    policies.policy().infer(seen)


class Tensor:
  """What PyTorch's tensors with gradients do when numpy asks for them."""

  def __array__(self, dtype=None, copy=None):
    raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")


@pytest.mark.parametrize("observation", [None, [], "pick up the cube", 3, [("prompt", "pick up the cube")]])
def test_what_is_no_observation_is_refused(ready, observation):
  with pytest.raises(ValueError, match="expected a dict of images"):
    ready.infer(observation)


@pytest.mark.parametrize("observations", [None, {}, "abc", 3, iter(())])
def test_what_is_no_list_of_observations_is_refused(ready, observations):
  with pytest.raises(ValueError, match="expected a list of observation dicts"):
    ready.infer_batch(observations)


@pytest.mark.parametrize("key", ["observation/image", "observation/state"])
@pytest.mark.parametrize(
  "value",
  [
    [[1, 2], [3]],
    Tensor(),
    "here",
    [None] * 8,
    {"a": 1},
    object(),
    1.0,
    [1j] * 8,
    np.array(["1"] * 8),
    b"\xff" * 9,
  ],
)
def test_values_of_any_other_type_are_refused(ready, key, value):
  with pytest.raises(ValueError, match="Observation, (image|state): got .*; expected") as error:
    ready.infer(policies.observation() | {key: value})
  assert type(error.value) is ValueError


@pytest.mark.parametrize(
  "sentence",
  [
    "\ud800",
    "pick up \udfff",
    b"\xff\xfe",
    3,
    ["pick up the cube"],
    np.array(["a", "b"]),
    " \u200b\n",
    b"",
    ("a",),
  ],
)
def test_what_is_no_sentence_is_refused(ready, sentence):
  with pytest.raises(ValueError, match="Observation, instruction: got") as error:
    ready.infer(policies.observation() | {"prompt": sentence})
  assert type(error.value) is ValueError
  str(error.value).encode()  # can be printed


def test_a_sentence_may_be_bytes_or_an_array_of_one_and_white_space_does_not_matter(ready):
  wanted = ready.observe([policies.observation()])
  plain = policies.observation()["prompt"]
  spaced = plain.replace(" ", "\t ")
  for same in (plain.encode(), np.array(plain), np.array([plain]), np.str_(plain), f"  {plain}\n", spaced):
    found = ready.observe([policies.observation() | {"prompt": same}])
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("missing", ["observation/image", "observation/wrist_image", "observation/state", "prompt"])
def test_no_input_is_proposed_in_another_ones_place(ready, missing):
  seen = {key: value for key, value in policies.observation().items() if key != missing}
  with pytest.raises(ValueError, match="Observation lacks") as error:
    ready.infer(seen)
  assert "rename" not in str(error.value)


def test_messages_do_not_grow_with_what_was_sent(ready):
  seen = policies.observation()
  for bad in (
    {"prompt": "go left " * 125_000},
    {"prompt": b"\xff" * 1_000_000},
    {"observation/state": "1" * 1_000_000},
    {"prompt": None} | {f"key {i}" * 100: i for i in range(1000)},
  ):
    with pytest.raises(ValueError) as error:
      ready.infer(seen | bad)
    assert len(str(error.value)) < 4000


def test_sentences_are_remembered_up_to_a_bound(monkeypatch):
  monkeypatch.setattr(preparation, "SENTENCES", 4)
  one = policies.policy()
  first = one.words(["pick up the red cube"])
  one.words([f"pick up cube {i}" for i in range(20)])
  assert one.preparation._encode.cache_info().currsize == 4
  for a, b in zip(one.words(["pick up the red cube"]), first):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
  ("state", "dimensions"),
  [
    (np.full(8, 1e30), {*range(8)}),
    (1000 * np.array([0.2, 0.1, 0.15, 0, 0, 0, 0.03, -0.03]), {0, 1, 2, 6, 7}),  # millimeters
    (np.array([0, 0, 0.15, 0, 0, 90.0, 0.03, -0.03]), {5}),  # degrees
    (np.array([0, 0, 0.15, 0, 0, 0, 0.03, -0.03]), set()),
  ],
)
def test_a_state_in_other_units_is_told_once_a_dimension(state, dimensions, caplog):
  one, seen = policies.policy(), policies.observation() | {"observation/state": state.astype(np.float32)}
  one.observe([seen])
  told = [record.getMessage() for record in caplog.records]
  assert {int(line.split("in dimension ")[1][0]) for line in told} == dimensions and len(told) == len(dimensions)
  assert all("as in the data of" in line for line in told)
  one.observe([seen, seen])
  assert len(caplog.records) == len(dimensions)


@pytest.mark.parametrize(
  "options",
  [
    {"batch_sizes": (0,)},
    {"batch_sizes": (1, -2)},
    {"batch_sizes": 4},
    {"batch_sizes": (1.0,)},
    {"batch_sizes": "1"},
    {"batch_sizes": (True,)},
    {"batch_sizes": None},
    {"replan_steps": 2.5},
    {"replan_steps": 0},
    {"replan_steps": True},
    {"replan_steps": "8"},
  ],
)
def test_sizes_and_counts_that_are_none_are_refused(options):
  with pytest.raises(ValueError, match=f"got {next(iter(options))}=.*; expected"):
    policies.policy(**options)


def test_parts_that_do_not_fit_say_why(folder):
  stats, words = policies.stats(), policies.tokenizers()
  model = tiny()
  params = random_params(model)
  with pytest.raises(ValueError, match=r"do not fit the model(.|\n)*- .*lora_a"):
    Policy(model, policies.adapted()[1], stats, words, policies.CONFIG)
  with pytest.raises(ValueError, match="got width 7; expected 8"):
    Policy(model, params, stats._replace(proprio=stats.action), words, policies.CONFIG)
  with pytest.raises(ValueError, match="replan_steps=9; expected 1 to 8"):
    policies.policy(replan_steps=9)
  with pytest.raises(ValueError, match="got instructions of 33 tokens; expected at most"):
    Policy(model, params, stats, words._replace(instruction_length=33), policies.CONFIG)
  with pytest.raises(ValueError, match="prunes by the instruction"):
    Policy(model, params, stats, words._replace(siglip=None), policies.CONFIG)
  with pytest.raises(ValueError, match="normalisation='q90'; expected one of"):
    policies.policy(config=policies.CONFIG | {"data": {"normalisation": "q90"}})
  entries = dict.fromkeys(("tabletop_pick", "tabletop_place"), statistics.to_openvla(stats))
  config = policies.CONFIG | {"data": {}}
  policy_folder.save_policy(folder / "two", params, config=config, statistics=entries, tokenizers=text.EMBEDDED)
  with pytest.raises(ValueError, match=r"several datasets: got \['tabletop_pick', 'tabletop_place'\]"):
    Policy.load(folder / "two")
  chosen = Policy.load(folder / "two", dataset="tabletop_pick", batch_sizes=())
  assert chosen.metadata["dataset"] == "tabletop_pick"
  assert chosen.tokenizers.instruction_length == model.text.positions, "unless the config says less"


def test_tensorflow_stays_out():
  modules = (
    "policy",
    "evaluate.rollout",
    "evaluate.results",
    "evaluate.fingerprint",
    "evaluate.controls",
    "evaluate.visualize",
    "evaluate.report",
    "evaluate.__main__",
  )
  lines = "".join(f"import semanticvla_jax.{name}\n" for name in modules)
  code = f"import sys\n{lines}print(sorted({{'tensorflow', 'torch'}} & sys.modules.keys()))"
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert result.stdout.strip() == "[]"
