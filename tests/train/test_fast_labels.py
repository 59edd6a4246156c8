"""FAST's tokens from the command to the robot: fitted, trained on, kept with the policy, acted with."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import policies
import pytest
from helpers import random_observation
from small_runs import CHANGES, NAME, losses_of, write_data

from configs import baselines
from semanticvla_jax import action_tokens, policy_folder
from semanticvla_jax.action_tokens import ActionTokenizer
from semanticvla_jax.data import __main__ as data_command
from semanticvla_jax.evaluate.rollout import OnDevice
from semanticvla_jax.policy import Policy
from semanticvla_jax.train import __main__ as command
from semanticvla_jax.train import diverged, inputs, optimizer
from semanticvla_jax.train import step as stepping
from semanticvla_jax.types import Batch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def fitted(data):
  path = data / "tokens.json"
  data_command.main(["fit-tokenizer", f"--data-dir={data}", f"--name={NAME}", "--vocab=80", f"--out={path}"])
  return path


def make_config(data, fitted, **changes):
  config = baselines.get_config("fast@tiny")
  own = {k: v for k, v in CHANGES.items() if not k.startswith("model")}
  config.update_from_flattened_dict(own | {"data.dir": str(data), "data.action_tokens": str(fitted)} | changes)
  return config


@pytest.fixture(scope="module")
def trained(data, fitted, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run")
  return workdir, command.train(make_config(data, fitted), workdir)


def test_the_command_trains_and_keeps_the_tokens_with_the_policy(trained, fitted):
  workdir, folder = trained
  assert sorted(losses_of(workdir)) == [1, 2, 3, 4]
  kept = folder / "tokenizers" / action_tokens.NAME
  assert kept.read_bytes() == fitted.read_bytes()
  policy = Policy.load(folder, batch_sizes=(1,))
  assert policy.bare.codec == action_tokens.load(fitted) and policy.bare.decoding == "constrained"
  actions = policy.infer(policies.observation())["actions"]
  assert actions.shape == (8, 7) and np.isfinite(actions).all()
  json.dumps(policy.config)


def test_a_policy_without_its_tokens_or_with_others(trained, tmp_path):
  copy = shutil.copytree(trained[1], tmp_path / "policy")
  before, path = policy_folder.policy_hash(copy), copy / "tokenizers" / action_tokens.NAME
  path.write_text(json.dumps(ActionTokenizer(8, 7).to_json()), encoding="utf-8")
  assert policy_folder.policy_hash(copy) != before == policy_folder.policy_hash(trained[1])
  path.unlink()
  with pytest.raises(
    ValueError, match=r"^No action tokens in \S*action_tokens.json: got no file;.* or copy it there\.$"
  ):
    Policy.load(copy)


def test_a_run_resumes_with_its_own_tokens_alone(trained, data, fitted, tmp_path):
  workdir = shutil.copytree(trained[0], tmp_path / "run")
  moved = shutil.copy(fitted, tmp_path / "moved.json")
  command.train(make_config(data, moved), workdir)  # nothing is left to do
  other = tmp_path / "other.json"
  other.write_text(json.dumps(ActionTokenizer(8, 7).to_json()), encoding="utf-8")
  with pytest.raises(ValueError, match="its run had another tokenizers"):
    command.train(make_config(data, other), workdir)


def test_tokens_of_a_base_are_taken_and_wrong_ones_refused(trained, data, fitted, tmp_path):
  config = make_config(data, fitted, **{"data.action_tokens": None})
  with pytest.raises(ValueError, match="config.data.action_tokens: got None with model.codec='fast'.*fit-tokenizer"):
    command.train(config, tmp_path)
  config.init_from = str(trained[1])
  assert inputs.tokenizer_files(config)[action_tokens.NAME] == trained[1] / "tokenizers" / action_tokens.NAME
  with pytest.raises(ValueError, match=r"with model.codec='bins'; expected None; set model.codec='fast'"):
    command.train(make_config(data, fitted, **{"model.codec": "bins", "model.decoding": "greedy"}), tmp_path)
  with pytest.raises(ValueError, match="normalized by 'bounds_q99'; expected 'bounds'"):
    command.train(make_config(data, fitted, **{"data.normalisation": "bounds"}), tmp_path)
  with pytest.raises(ValueError, match=r"action tokens of chunks \(8, 7\); expected \(4, 7\)"):
    command.train(make_config(data, fitted, **{"model.chunk": 4}), tmp_path)


@pytest.mark.slow
def test_tokens_learned_are_those_that_are_spoken(data, fitted, tmp_path):
  config = make_config(data, fitted, **{"optim.lr": 3e-3, "optim.decay_steps": None, "trainable": ".*"})
  config.lora = None
  model, bare = command.init.make_model(config)
  observation = random_observation(bare, 2, 12, lengths=np.array([12, 9]))
  actions = np.stack([np.linspace(-0.8, 0.8, 56).reshape(8, 7), np.full((8, 7), 0.3)]).astype(np.float32)
  batch = inputs.as_read(Batch(observation, jnp.asarray(actions), jnp.ones((2, 8), bool)), bare)
  said = (batch.labels >= 0).sum(axis=1)
  assert said[0] != said[1], "chunks of different lengths"
  transform = optimizer.transform(config.optim)
  params = jax.jit(model.init)(jax.random.key(0), observation)["params"]
  state = stepping.new_state(transform, params)
  step = jax.jit(stepping.make_step(model, transform, optimizer.schedule(config.optim), 0))
  losses = []
  for _ in range(150):
    state, metrics = step(state, {}, batch)
    losses.append(float(metrics["loss"]))
  assert losses[0] == pytest.approx(np.log(512), rel=0.1) and losses[-1] < 0.1 and metrics["accuracy"] == 1
  for decoding in ("constrained", "greedy"):
    out = jax.jit(bare.clone(decoding=decoding).apply)({"params": state.trainable}, observation)
    assert not out.intermediates["malformed"].any()
    np.testing.assert_array_equal(out.actions, bare.codec.decode(bare.codec.encode(actions)))
  diverged.save_batch(jax.tree.map(jnp.asarray, batch), tmp_path, 3)
  again = diverged.load_batch(tmp_path / "bad_batch_3.npz")
  np.testing.assert_array_equal(again.labels, batch.labels)


@pytest.mark.slow
def test_the_compiled_tabletop_evaluation_runs_it(trained):
  policy = Policy.load(trained[1], batch_sizes=())
  found = OnDevice(policy, "pick", replan_steps=8, batch=2).run([0, 1])
  assert found.valid == 2 and not found.nonfinite.any() and found.steps.max() > 0
