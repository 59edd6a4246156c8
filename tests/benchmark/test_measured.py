"""The verbs that measure, end to end with the smallest model, and what they need installed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from semanticvla_jax.benchmark import __main__ as command
from semanticvla_jax.benchmark import latency, policies, roofline, timing

ROOT = Path(__file__).resolve().parents[2]


def figures(tmp_path, *words):
  command.main([*words, "--smoke", f"--out={tmp_path / 'out.json'}"])
  found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
  return {name: figure["value"] for name, figure in found["figures"].items()}, found["record"]


def test_latency_end_to_end(tmp_path):
  found, record = figures(tmp_path, "latency", "--option=replan_steps=4")
  for layer in ("program", "transfers", "infer"):
    quantiles = [found[f"full {layer} {q}"] for q in ("min", "p50", "p95", "p99")]
    assert quantiles == sorted(quantiles) and quantiles[0] > 0
  assert found["full cold start"] == found["full load"] + found["full compile"]
  ideal = max(found["full ideal by bytes"], found["full ideal by FLOPs"])
  assert found["full share of the roofline"] == pytest.approx(ideal / found["full program p50"])
  assert record["settings"]["prompt"] == 32 and record["models"]["full"]["variant"] == "tiny"
  assert record["settings"]["dtype"] == "float32" and record["settings"]["calls"] == 3


@pytest.mark.slow
def test_train_end_to_end(tmp_path):
  found, record = figures(tmp_path, "train", "--batch=2")
  assert found["full examples"] == pytest.approx(2e3 / found["full step p50"])
  rate = found["full example"] * found["full examples"] / 1e12
  assert found["full of the matmul rate"] == pytest.approx(rate / found["matmul"])
  assert found["full forward"] > 0 and found["full step by its compiler"] > 1e6
  assert record["settings"]["batch"] == 2


def test_data_end_to_end(tmp_path):
  step = {"verb": "train", "record": {}, "figures": {"full examples": {"value": 2.0, "unit": "examples/s"}}}
  (tmp_path / "train.json").write_text(json.dumps(step))
  found, _ = figures(tmp_path, "data", f"--step={tmp_path / 'train.json'}", "--batch=4")
  threads = next(value for name, value in found.items() if name == "loader, 1 threads")
  assert threads > 0 and found["loader / full step"] > 0 and 0 < found["decoding, of a thread's time"]
  assert found["loader / plain tf.data, 1 threads"] == pytest.approx(threads / found["plain tf.data, 1 threads"])
  assert found["v5e-16 at MFU 0.4, full@tiny, takes"] > threads
  (tmp_path / "train.json").write_text(json.dumps(step | {"verb": "latency"}))
  with pytest.raises(ValueError, match=r"^--step: got a result of latency; expected one of train; "):
    figures(tmp_path, "data", f"--step={tmp_path / 'train.json'}")


def test_scale_end_to_end(tmp_path):
  found, _ = figures(tmp_path, "scale", str(tmp_path / "set"), "--frames=540", "--batch=2")
  assert found["frames"] == 540 and 0 < found["both again, from the cache"] and 0 < found["resuming at the last batch"]
  assert found["resident, highest"] >= found["resident after the first batch"] > 50


@pytest.mark.parity
def test_the_peer_runs_beside_both(tmp_path):
  found, record = figures(tmp_path, "latency", "--peer=eager")
  assert found["full PyTorch eager / ours"] > 0 and {"torch", "transformers"} <= record["versions"].keys()
  found, _ = figures(tmp_path, "train", "--peer=eager", "--batch=1")
  assert found["full PyTorch eager / ours"] > 0


@pytest.mark.parity
@pytest.mark.parametrize("row", ["full", "oft"])
def test_the_peer_has_the_sizes_and_the_sequence_of_ours(row):
  import torch
  from helpers import random_observation, random_params

  from semanticvla_jax.benchmark import peer, rows
  from semanticvla_jax.models.semanticvla import build

  model = build(rows.model(row, "tiny"))
  out = model.apply({"params": random_params(model)}, random_observation(model, batch=2, prompt=32))
  theirs = peer.Peer(row, "tiny", "float32", 32, 2)
  with torch.no_grad():
    states = theirs.network(*theirs.inputs)
  assert states.shape == out.intermediates["sequence"].shape
  step, _ = theirs.lora_step("eager")
  step()
  adapted = [name for name, layer in theirs.network.named_modules() if isinstance(layer, peer.LoRALinear)]
  depth = sum(vit.depth - (model.vision_layer != "last") for vit in (model.dino, model.siglip))
  assert len(adapted) == 6 * depth + 7 * model.llm.depth
  assert all(layer.b.abs().sum() > 0 for layer in theirs.network.modules() if isinstance(layer, peer.LoRALinear))


def test_blocks_alternate_and_every_call_is_timed():
  called = []
  found = timing.in_turns({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, calls=5, blocks=2)
  assert {name: len(seconds) for name, seconds in found.items()} == {"a": 5, "b": 5}
  assert "".join(called) == "aaa" + "bbb" + "aaaa" + "bbbb"


def test_the_roofline_is_the_slower_of_both_and_counts_no_embedding_table():
  rates = {"copy": 100.0, "matmul": 10.0}
  assert roofline.ideal_seconds(200, 10, rates) == 2.0 and roofline.ideal_seconds(200, 50, rates) == 5.0
  params = {"llm": {"embed": {"embedding": np.zeros((50, 4))}, "norm": {"scale": np.zeros(4, np.float32)}}}
  assert roofline.weight_bytes(params) == 16


def test_options_that_policy_does_not_have_are_refused_with_those_it_has():
  assert latency.options(["replan_steps=4", "gripper=raw"]) == {"replan_steps": 4, "gripper": "raw"}
  for word in ("nothing=1", "gripper"):
    with pytest.raises(ValueError, match=r"^--option: got '.*'; expected NAME=VALUE with a name of .*batch_sizes"):
      latency.options([word])


ON_A_BARE_MACHINE = """
import sys
BLOCKED = {"tensorflow", "tensorflow_datasets", "ml_collections", "torch", "PIL", "sentencepiece", "matplotlib"}

class Block:
  def find_spec(self, name, path=None, target=None):
    if name.partition(".")[0] in BLOCKED:
      raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
from semanticvla_jax.benchmark import __main__, compare, flops, latency, policies, roofline, timing, train
policy = policies.random_policy("full", "tiny", batch_sizes=())
seen = policy.observe(policies.observation_dicts(policy, 2))
print(seen.prompt.shape, seen.prompt_mask.sum(axis=1).tolist(), *sorted(BLOCKED & sys.modules.keys()))
sys.exit(__main__.main(["flops", "--row=full", "--smoke"]))
"""


def test_a_machine_without_tensorflow_configs_tokenizers_and_pillow_can_measure():
  command = [sys.executable, "-c", ON_A_BARE_MACHINE]
  run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
  assert run.returncode == 0, run.stderr[-2000:]
  assert run.stdout.splitlines()[0] == "(2, 32) [29, 29]"


def test_random_policies_act_and_are_a_function_of_the_seed():
  policy = policies.random_policy("lite", "tiny", "float32", prompt=40, seed=1, batch_sizes=(1,))
  (observation,) = policies.observation_dicts(policy, 1)
  actions = policy.infer(observation)["actions"]
  assert actions.shape == (8, 7) and np.isfinite(actions).all() and policy.tokenizers.prompt_length == 40
  again = policies.random_policy("lite", "tiny", "float32", prompt=40, seed=1, batch_sizes=(1,))
  np.testing.assert_array_equal(again.infer(observation)["actions"], actions)
