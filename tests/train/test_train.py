"""The command as a user runs it, at tiny size, on a small RLDS dataset written here."""

import json
import shutil
from collections import deque
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers import random_observation
from small_runs import CHANGES, losses_of, make_config, write_data

from configs import common, openvla, pretrain
from semanticvla_jax import policy_folder
from semanticvla_jax.data import text
from semanticvla_jax.train import __main__ as command
from semanticvla_jax.train import checkpoints, diverged, inputs, optimizer, resume
from semanticvla_jax.train import step as stepping
from semanticvla_jax.train.partition import partition
from semanticvla_jax.types import Batch


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("straight")
  return workdir, command.train(make_config(data), workdir)


def test_writes_a_complete_policy_and_metrics(straight, data):
  workdir, policy = straight
  files = policy_folder.load_policy(policy)
  assert files.metadata["step"] == 4 and files.metadata["merged"] is False
  assert files.config["model"]["keep"] == make_config(data).model.keep
  assert len(files.statistics["tabletop_test"]["action"]["q01"]) == 7
  assert sorted(losses_of(workdir)) == [1, 2, 3, 4]
  assert list((workdir / "tensorboard").iterdir())


def test_trains_every_trainable_and_no_frozen_parameter(straight, data):
  config = make_config(data)
  model, bare = command.init.make_model(config)
  wanted = command.init.shapes(model, bare, config.trainable, config.frozen_dtype)
  where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  before = command.init.init_params(model, bare, config.seed, wanted, where)
  after = policy_folder.load_policy(straight[1]).params
  trainable, frozen = (flatten_dict(tree, sep="/") for tree in partition(before, config.trainable))
  after = flatten_dict(after, sep="/")
  assert all(np.array_equal(after[k], x) for k, x in frozen.items())
  assert [k for k, x in trainable.items() if np.array_equal(after[k], x)] == []


def test_resumed_run_equals_the_uninterrupted_one(straight, data, tmp_path):
  half = make_config(data, steps=2)
  command.train(half, tmp_path)
  policy = command.train(make_config(data), tmp_path)
  assert losses_of(tmp_path) == losses_of(straight[0])
  ours, theirs = (policy_folder.load_policy(p).params for p in (policy, straight[1]))
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(straight, data, tmp_path, caplog):
  shutil.copytree(straight[0], tmp_path, dirs_exist_ok=True)
  shutil.rmtree(tmp_path / "policy")
  for path in (tmp_path / "checkpoints" / "4" / "train").rglob("d/*"):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  policy = command.train(make_config(data), tmp_path)
  assert "CORRUPT CHECKPOINT" in caplog.text and "going on from the one before" in caplog.text
  assert losses_of(tmp_path) == losses_of(straight[0])
  ours, theirs = (policy_folder.load_policy(p).params for p in (policy, straight[1]))
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.slow
def test_one_device_gives_the_losses_of_eight(straight, data, tmp_path, monkeypatch):
  devices = jax.devices()
  monkeypatch.setattr(command.sharding.jax, "devices", lambda: devices[:1])
  command.train(make_config(data), tmp_path)
  ours, theirs = losses_of(tmp_path), losses_of(straight[0])
  assert [ours[k] for k in (1, 2, 3, 4)] == pytest.approx([theirs[k] for k in (1, 2, 3, 4)], rel=2e-4)


def test_a_base_whose_adapters_count_otherwise_is_refused_before_a_weight_is_read(straight, data, tmp_path):
  config = make_config(data, steps=1)
  config.init_from, config.lora.alpha = str(straight[1]), 16.0
  with pytest.raises(ValueError, match=r"trained for other settings: got .*lora.alpha: 4.0 → 16.0"):
    command.train(config, tmp_path)


def test_workdir_of_another_config_is_refused(straight, data):
  config = make_config(data)
  config.optim.lr = 5e-3
  before = sorted(p.name for p in (straight[0] / "checkpoints").iterdir())
  with pytest.raises(ValueError, match=r"its run had another config: got optim.lr: 0.01 → 0.005 \(before"):
    command.train(config, straight[0])
  assert sorted(p.name for p in (straight[0] / "checkpoints").iterdir()) == before


def test_a_run_from_when_every_config_had_the_tabletops_fields_resumes():
  config = resume.plain(common.get_config("tiny"))
  older = json.loads(json.dumps(config))
  older["data"] |= {"suites": None, "starts": 0.0, "askew": 0.0}
  older["train"]["grounding"] = None
  assert resume.differences(older, config) == []
  pretraining = resume.plain(pretrain.get_config())
  assert resume.differences(json.loads(json.dumps(pretraining)), pretraining) == []
  other = pretrain.get_config("turn")
  other.seed = pretraining["seed"]
  assert "data.askew: 0.0 → 0.5" in resume.differences(pretraining, resume.plain(other))


def test_a_later_version_resumes_an_earlier_run():
  start = pretrain.get_config()
  start.data.starts = 0.0
  config = resume.plain(start)
  older = json.loads(json.dumps(config))
  for path in resume.FIELD_DEFAULTS_BEFORE:
    *folders, name = path.split(".")
    del (older[folders[0]] if folders else older)[name]
  assert resume.differences(older, config) == []
  config["optim"]["ema"] = 0.99
  config["seed"] += 1
  assert resume.differences(older, config) == ["optim.ema: None → 0.99", "seed: 7 → 8"]


def test_what_may_change_when_a_run_moves():
  saved = resume.plain(common.get_config("tiny"))
  moved = json.loads(json.dumps(saved))
  moved["mesh"]["fsdp"], moved["model"]["remat"], moved["init_from"] = 2, "full", "elsewhere/policy"
  moved["data"] |= {"dir": "gs://bucket/data", "tokenizers": "elsewhere/words"}
  moved["train"] |= {"steps": 10, "spike": 4.0}
  assert resume.differences(saved, moved) == []
  moved["model"]["scan"], moved["train"]["grounding"], moved["lora"] = False, {"naming": 0.1}, None
  assert [line.split(":")[0] for line in resume.differences(saved, moved)] == [
    "lora",
    "model.scan",
    "train.grounding.naming",
  ]


def test_a_run_goes_on_with_its_base_data_and_tokenizers(caplog):
  run = Path("run")
  stats = {"tabletop": {"action": {"mean": [0.1, 0.2], "mask": [True, False]}, "num_transitions": 100}}
  saved = {"config": {}, "base": ["ab"], "tokenizers": "cd", "statistics": stats}
  rounded = {"tabletop": {"action": {"mean": [0.1 + 1e-8, 0.2], "mask": [True, False]}, "num_transitions": 100}}
  resume.check_origin(saved, saved | {"statistics": rounded}, run)
  with pytest.raises(ValueError, match=r"workdir run: its run had another base: got base \['ab'\] → \['ef'\]"):
    resume.check_origin(saved, saved | {"base": ["ef"]}, run)
  more = {"tabletop": stats["tabletop"] | {"num_transitions": 120}}
  data = {"data": {"tabletop": "01"}}
  with pytest.raises(ValueError, match=r"another data: got data \{'tabletop': '01'\} → \{'tabletop': '02'\}"):
    resume.check_origin(saved | data, saved | {"data": {"tabletop": "02"}}, run)
  with pytest.raises(ValueError, match=r"got statistics tabletop \(100 frames\) → tabletop \(120 frames\)"):
    resume.check_origin(saved, saved | {"statistics": more}, run)
  assert not caplog.text
  resume.check_origin({"config": {}}, saved, run)  # a checkpoint of an earlier version
  assert "its base, statistics, tokenizers cannot be compared" in caplog.text


def test_checkpoints_say_what_the_run_stands_on(straight):
  with checkpoints.Checkpointer(straight[0]) as checkpointer:
    saved = checkpointer.restore({}).json
  assert saved["base"] == [] and list(saved["statistics"]) == ["tabletop_test"] and len(saved["tokenizers"]) == 16
  assert len(saved["losses"]) == 4  # a spike is known from the start when the run goes on


def values(loss, **norms):
  return {"loss": loss, "grad_norm": 1.0} | {f"grad_norm/{name}": x for name, x in norms.items()}


def test_spike_stops_with_step_and_family():
  history = deque([1.0] * 30, maxlen=200)
  diverged.check([values(1.2), values(4.0)], history, 31, None, {})  # not asked for
  message = r"step 42: loss 9 is 9.0 times .*largest gradients: \['coupler', 'llm'\]"
  with pytest.raises(diverged.Diverged, match=message):
    diverged.check([values(1.0), values(9.0, llm=1.0, coupler=7.0)], history, 41, 5.0, {})
  short = deque([1.0] * 5, maxlen=200)
  diverged.check([values(9.0)], short, 6, 5.0, {})  # too early to tell


def test_nan_names_the_first_step_and_the_gradients_that_broke():
  bad = values(float("nan"), llm=1.0, coupler=float("nan"))
  with pytest.raises(diverged.NotFinite, match=r"step 8: loss nan.*not finite: \['coupler'\]") as caught:
    diverged.check([values(1.0), bad, bad], deque(), 7, None, {})
  assert caught.value.step == 8


def test_profile_steps():
  assert command.parse_steps(None) is None and command.parse_steps("3:5") == (3, 5)
  for wrong in ("3", "5:3", "0:2", "a:b"):
    with pytest.raises(ValueError, match="expected FIRST:LAST"):
      command.parse_steps(wrong)


def test_nan_stops_with_step_and_family(data, tmp_path):
  config = make_config(data)
  config.optim.lr = float("inf")
  with pytest.raises(diverged.NotFinite, match=r"step \d: .*not finite: \[.*'coupler'"):
    command.train(config, tmp_path)
  assert not (tmp_path / "policy").exists()
  (saved,) = tmp_path.glob("bad_batch_*.npz")
  batch = np.load(saved)
  assert batch["actions"].shape == (8, config.model.chunk, 7)
  assert batch["observation.images"].dtype == np.uint8
  again = diverged.load_batch(saved)
  np.testing.assert_array_equal(again.observation.prompt, batch["observation.prompt"])
  start, values = command.debug_batch(make_config(data), tmp_path / "sound", saved)
  assert start == 0 and np.isfinite(values["loss"]) and values["grad_norm/coupler"] > 0
  assert not list((tmp_path / "sound").rglob("*.npz")) and not (tmp_path / "sound" / "policy").exists()
  config = make_config(data)
  config.data.batch_size = 16
  with pytest.raises(ValueError, match="got 8 examples in .*expected 16"):
    command.debug_batch(config, tmp_path / "sound", saved)


def test_tokenizers_of_another_model_are_refused(data):
  config = make_config(data)
  _, bare = command.init.make_model(common.get_config("7b"))
  with pytest.raises(ValueError, match="got 499 pieces; expected nearly 32064.*tokenizer.model"):
    inputs.load_tokenizers(config, bare)


def test_tokenizers_come_from_the_bases_where_none_are_named(data, tmp_path):
  """The released bases: one has the language model's, the other SigLIP's. The first that has a file gives it."""
  config = make_config(data)
  for base, names in (("first", ["tokenizer.model"]), ("second", ["spiece.model", "tokenizer.model"])):
    (tmp_path / base / "tokenizers").mkdir(parents=True)
    for name in names:
      (tmp_path / base / "tokenizers" / name).write_bytes((text.EMBEDDED / name).read_bytes())
  config.init_from = f"{tmp_path / 'first'},{tmp_path / 'second'},random"
  found = {name: path.parent.parent.name for name, path in inputs.tokenizer_files(config).items()}
  assert found == {"tokenizer.model": "first", "spiece.model": "second"}
  config.data.tokenizers = str(tmp_path / "second" / "tokenizers")
  assert {path.parent.parent.name for path in inputs.tokenizer_files(config).values()} == {"second"}
  config.update(init_from=None)
  config.data.tokenizers = None
  assert inputs.tokenizer_files(config) == text.files(text.EMBEDDED)


def token_config(**values):
  config = openvla.get_config("@tiny")
  config.update_from_flattened_dict({"optim.lr": 3e-3, "data.prompt_length": 12} | values)
  return config


@pytest.mark.slow
@pytest.mark.parametrize("chunk, decoding", [(1, "greedy"), (2, "jacobi")])
def test_action_tokens_learned_are_those_that_are_spoken(chunk, decoding):
  config = token_config(trainable=".*", **{"model.chunk": chunk, "model.decoding": decoding})
  config.lora = None
  model, bare = command.init.make_model(config)
  observation = random_observation(bare, 2, 12, lengths=np.array([12, 9]))
  actions = np.array([[[-1, -0.7, -0.2, 0, 0.3, 0.8, 1]], [[1, 0.5, 0.1, 0, -0.4, -0.9, 0]]], np.float32)
  actions = np.concatenate([actions, 0.3 - actions], axis=1)[:, :chunk].clip(-1, 1)
  batch = Batch(observation, jnp.asarray(actions), jnp.ones((2, chunk), bool))
  transform = optimizer.transform(config.optim)
  params = jax.jit(model.init)(jax.random.key(0), observation)["params"]
  state, before = stepping.new_state(transform, params), params
  step = jax.jit(stepping.make_step(model, transform, optimizer.schedule(config.optim), 0))
  losses = []
  for _ in range(150):
    state, metrics = step(state, {}, batch)
    losses.append(float(metrics["loss"]))
  assert losses[0] == pytest.approx(np.log(512), rel=0.1) and losses[-1] < 0.1 and metrics["accuracy"] == 1
  spoken = jax.jit(model.apply)({"params": state.trainable}, observation).actions
  np.testing.assert_allclose(spoken, actions, atol=1 / 255 + 1e-6)
  assert float(metrics["l1"]) == pytest.approx(float(np.abs(spoken - actions).mean()), rel=1e-4)
  assert not np.array_equal(before["llm"]["lm_head"]["kernel"], state.trainable["llm"]["lm_head"]["kernel"])


@pytest.mark.slow
def test_action_tokens_with_adapters_from_the_command(data, tmp_path):
  config = token_config(**{k: v for k, v in CHANGES.items() if not k.startswith("model")})
  config.data.dir, config.data.batch_size = str(data), 8
  policy = command.train(config, tmp_path)
  assert sorted(losses_of(tmp_path)) == [1, 2, 3, 4]
  files = policy_folder.load_policy(policy)
  assert "lora_a" in files.params["llm"]["lm_head"]


def test_base_of_another_size_is_refused():
  fresh = {"llm": {"kernel": np.zeros((3, 3))}}
  with pytest.raises(ValueError, match=r"init_from base: got 1 parameters the model does not have.*1 of another shape"):
    command.init.match_base(fresh, {"llm": {"kernel": np.zeros((3, 4)), "bias": np.zeros(3)}}, "base")


def test_matching_parameters_alone_are_taken_where_that_is_asked_for(caplog):
  wanted = {"llm": {"kernel": np.zeros((3, 3)), "bias": np.zeros(3)}}
  base = {"llm": {"kernel": np.zeros((3, 4)), "bias": np.zeros(3)}, "dense_fuser": {"bias": np.zeros(2)}}
  with caplog.at_level("INFO"):
    taken, new = command.init.assign_sources(wanted, {"base": base}, ".*", matching=True)
  assert taken == {"base": ["llm/bias"]} and [*flatten_dict(new, sep="/")] == ["llm/kernel"]
  assert "init_from base: left 2 parameters that do not match unread" in caplog.text
  with pytest.raises(ValueError, match="take what fits with --config.init_from=…,matching"):
    command.init.assign_sources(wanted, {"base": base}, ".*")
  assert command.init.bases("a,matching") == (["a"], False) and command.init.matching("a, matching")


def tree(*paths):
  return unflatten_dict({path: np.zeros((2, 2)) for path in paths}, sep="/")


def test_frozen_parameters_are_never_drawn_without_being_asked():
  wanted, base = tree("llm/kernel", "llm/lora_a", "text/kernel", "coupler/kernel"), tree("llm/kernel")
  with pytest.raises(ValueError, match=r"got None, which leaves 2 frozen .*\(llm/kernel, text/kernel"):
    command.init.assign_sources(wanted, {}, "coupler/.*")
  with pytest.raises(ValueError, match=r"got A, which leaves 1 frozen .*\(text/kernel.*--config.init_from=A,random"):
    command.init.assign_sources(wanted, {"A": base}, "coupler/.*")
  taken, new = command.init.assign_sources(wanted, {"A": base, "B": tree("text/kernel", "llm/other")}, "coupler/.*")
  assert taken == {"A": ["llm/kernel"], "B": ["text/kernel"]}  # B completes: the rest of it does not matter
  assert sorted(flatten_dict(new, sep="/")) == ["coupler/kernel", "llm/lora_a"]
  taken, new = command.init.assign_sources(wanted, {}, "coupler/.*", random=True)
  assert taken == {} and len(flatten_dict(new)) == 4
  assert command.init.assign_sources(wanted, {}, ".*")[0] == {}  # from scratch: all of it is trained
  assert command.init.bases("a, b,random") == (["a", "b"], True) and command.init.bases(None) == ([], False)


def test_heads_of_another_policy_are_left_unread_and_said(caplog):
  wanted = tree("llm/kernel", "coupler/trans/kernel", "coupler/queries")
  with caplog.at_level("INFO"):
    taken = command.init.match_base(
      wanted, tree("llm/kernel", "llm/lm_head/kernel", "coupler/queries", "coupler/head/kernel"), "base"
    )
  assert taken == ["llm/kernel"]  # the coupler is new as a whole
  assert "left 1 parameters of llm/lm_head/ unread" in caplog.text and "left 2 parameters of coupler/" in caplog.text
  assert command.init.match_base(wanted, wanted, "base") == ["coupler/queries", "coupler/trans/kernel", "llm/kernel"]
  with pytest.raises(ValueError, match="got 1 parameters the model does not have"):  # adapters are no head
    command.init.match_base(wanted, wanted | {"coupler": {"trans": {"lora_a": np.zeros(2)}}}, "base")


def test_the_command_starts_from_a_base_and_completes_it_from_another(straight, data, tmp_path):
  base = policy_folder.load_policy(straight[1])
  towers = {name: base.params[name] for name in ("text", "siglip")}
  whole = {k: v for k, v in base.params.items() if k not in ("text", "coupler")}
  facts = dict(config=base.config, statistics=base.statistics)
  a = policy_folder.save_policy(tmp_path / "a", whole | {"coupler": {"other": {"kernel": jnp.ones((2, 2))}}}, **facts)
  b = policy_folder.save_policy(tmp_path / "b", towers, config=base.config, statistics={})
  config = make_config(data, steps=1)
  config.init_from = str(a)
  with pytest.raises(ValueError, match="frozen parameters without values .text/"):
    command.train(config, tmp_path / "run")
  config.init_from = f"{a},{b}"
  after = policy_folder.load_policy(command.train(config, tmp_path / "run")).params
  jax.tree.map(np.testing.assert_array_equal, after["text"], base.params["text"])
  np.testing.assert_array_equal(after["llm"]["embed"]["embedding"], base.params["llm"]["embed"]["embedding"])
