"""An evaluation through a server gives the results of the policy folder, and its fingerprint says so."""

import json

import pytest
import serving
from helpers import random_params, tiny
from policies import CONFIG, stats

from semanticvla_jax import policy_folder
from semanticvla_jax.data import statistics, text
from semanticvla_jax.evaluate import __main__ as command
from semanticvla_jax.evaluate import fingerprint
from semanticvla_jax.evaluate.served import KEY, ServedPolicy, is_url
from semanticvla_jax.policy import Policy
from semanticvla_jax.serve.client import ServerGone


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path, entries = tmp_path_factory.mktemp("policies") / "tiny", {"tabletop_pick": statistics.to_openvla(stats())}
  policy_folder.save_policy(path, random_params(tiny()), config=CONFIG, statistics=entries, tokenizers=text.EMBEDDED)
  return path


@pytest.fixture(scope="module")
def served(folder):
  with serving.serving(Policy.load(folder, batch_sizes=(1, 2)), key=serving.KEY) as (_, port):
    yield f"ws://127.0.0.1:{port}"


@pytest.fixture(autouse=True)
def with_key(monkeypatch):
  monkeypatch.setenv(KEY, serving.KEY)


def run(policy, out, *more):
  flags = ["--suite=pick", "--episodes=2", "--films=0", *more]
  command.main(["run", f"--policy={policy}", f"--out={out}", *flags])
  return json.loads((out / "results.json").read_text())["results"]


def test_the_results_are_those_of_the_folder_and_the_fingerprint_says_that_it_was_served(folder, served, tmp_path):
  (own,) = run(folder, tmp_path / "own", "--host")
  through, shuffled = run(served, tmp_path / "served", "--controls=shuffled")
  assert own["per_episode"] == through["per_episode"] and len(own["per_episode"]) == 2
  assert through["fingerprint"]["served"]["protocol"] == "openpi" and shuffled["kind"] == "control"
  differ = fingerprint.differences(own["fingerprint"], through["fingerprint"])
  assert set(differ) == {"served", "policy.folder"}
  fingerprint.require_alike(own["fingerprint"], through["fingerprint"])


def test_a_batch_keeps_its_order(served, folder):
  policy, remote = Policy.load(folder, batch_sizes=(1,)), ServedPolicy(served, connections=2)
  seen = [serving.observation(seed) for seed in range(5)]
  for one, other in zip(remote.infer_batch(seen), seen):
    assert abs(one["actions"] - policy.infer(other)["actions"]).max() < 1e-4
  remote.reset()
  remote.close()


@pytest.mark.parametrize("flag", ["--dataset=x", "--dtype=bfloat16", "--controls=blind"])
def test_what_only_the_server_can_change_is_refused(served, tmp_path, flag):
  with pytest.raises(SystemExit, match=flag.partition("=")[0]):
    run(served, tmp_path, flag)


def test_a_wrong_key_and_no_server(served, tmp_path, monkeypatch):
  monkeypatch.setenv(KEY, "a wrong key, long enough")
  with pytest.raises(SystemExit, match="pass the server's key"):
    run(served, tmp_path)
  assert is_url("wss://robot:1") and not is_url("runs/ws") and not is_url(None)
  assert issubclass(ServerGone, ConnectionError)
