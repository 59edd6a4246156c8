"""Policy folders are whole and name their own damage; training resumes from the newest checkpoint that can be read."""

import json
import logging
import os
import shutil
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from semanticvla_jax import policy_folder
from semanticvla_jax.train import checkpoints

CONFIG = {"model": {"variant": "tiny", "encoders": ("dino", "siglip")}, "lora": None, "data": {"normalisation": "q99"}}
STATISTICS = {"tabletop": {"action": {"q01": [0.0, 1.0]}}}

# Orbax leaves the other reads behind when one fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def params(seed=0):
  keys = jax.random.split(jax.random.key(seed), 3)
  return {
    "llm": {"embed": jax.random.normal(keys[0], (64, 16)), "norm": jax.random.normal(keys[1], (16,), jnp.bfloat16)},
    "coupler": {"kernel": jax.random.normal(keys[2], (16, 8))},
  }


def words(x):
  return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  a, b = jax.tree.map(words, (a, b))
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)
  assert [x.dtype for x in jax.tree.leaves(a)] == [x.dtype for x in jax.tree.leaves(b)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  root = tmp_path_factory.mktemp("policies")
  words = root / "words"
  words.mkdir()
  (words / "tokenizer.model").write_bytes(b"pieces")
  (words / "notes.txt").write_text("stays behind")
  return policy_folder.save_policy(
    root / "policy", params(), config=CONFIG, statistics=STATISTICS, metadata={"step": 7}, tokenizers=words
  )


@pytest.fixture
def copy(saved, tmp_path):
  shutil.copytree(saved, tmp_path / "policy")
  return tmp_path / "policy"


def test_a_policy_comes_back_as_it_was(saved):
  files = policy_folder.load_policy(saved)
  assert_same(files.params, params())
  assert files.config["model"] == {"variant": "tiny", "encoders": ["dino", "siglip"]}
  assert files.statistics == STATISTICS
  assert files.metadata["step"] == 7 and files.metadata["merged"] and files.metadata["parameters"] == 64 * 16 + 16 + 128
  assert [path.name for path in files.tokenizers.iterdir()] == ["tokenizer.model"]
  assert [path.name for path in saved.parent.iterdir() if path.name.startswith(".")] == []


def test_adapters_are_seen_and_said(tmp_path):
  tree = params() | {"layer": {"kernel": jnp.ones((2, 2)), "lora_a": jnp.ones((2, 1)), "lora_b": jnp.ones((1, 2))}}
  folder = policy_folder.save_policy(tmp_path / "adapted", tree, config=CONFIG, statistics=STATISTICS)
  assert policy_folder.load_policy(folder).metadata["merged"] is False


def test_parameters_land_where_and_as_what_they_are_wanted(saved):
  mesh = jax.make_mesh((4,), ("fsdp",))

  def spread(tree):
    return jax.tree.map(lambda x: NamedSharding(mesh, PartitionSpec("fsdp" if x.ndim == 2 else None)), tree)

  files = policy_folder.load_policy(saved, sharding=spread, dtype=jnp.float16)
  embed = files.params["llm"]["embed"]
  assert embed.dtype == jnp.float16 and len(embed.sharding.device_set) == 4
  assert embed.addressable_shards[0].data.shape == (16, 16)
  np.testing.assert_array_equal(embed, params()["llm"]["embed"].astype(jnp.float16))
  everywhere = NamedSharding(mesh, PartitionSpec())
  assert_same(policy_folder.load_policy(saved, sharding=everywhere).params, params())


def test_a_hash_names_parameters_config_and_statistics(saved, copy, tmp_path):
  assert policy_folder.policy_hash(saved) == policy_folder.policy_hash(copy)
  others = [
    dict(params=params(1), config=CONFIG, statistics=STATISTICS),
    dict(params=params(), config=CONFIG | {"lora": {"rank": 1}}, statistics=STATISTICS),
    dict(params=params(), config=CONFIG, statistics={}),
  ]
  for i, other in enumerate(others):
    tree = other.pop("params")
    folder = policy_folder.save_policy(tmp_path / f"other{i}", tree, **other, metadata={"step": 7})
    assert policy_folder.policy_hash(folder) != policy_folder.policy_hash(saved)
  swapped = {"a": params()["llm"]["norm"], "b": params()["coupler"]["kernel"]}
  assert policy_folder.params_hash(swapped) != policy_folder.params_hash({"a": swapped["b"], "b": swapped["a"]})


def test_nothing_is_overwritten(saved):
  before = policy_folder.policy_hash(saved)
  with pytest.raises(ValueError, match="Policy folder exists"):
    policy_folder.save_policy(saved, params(1), config=CONFIG, statistics=STATISTICS)
  assert policy_folder.policy_hash(saved) == before
  with pytest.raises(ValueError, match=r"config\.json is not JSON"):
    policy_folder.save_policy(saved.parent / "bad", params(), config={"model": object()}, statistics={})
  assert not (saved.parent / "bad").exists()


def test_damage_says_what_and_what_to_do(saved, copy, tmp_path):
  with pytest.raises(ValueError, match=r"does not exist; expected a policy folder; name one .nearby are .*policy"):
    policy_folder.load_policy(saved.parent / "polcy")
  with pytest.raises(ValueError, match=r"not complete.*did you mean .*policy\?"):
    policy_folder.load_policy(copy.parent)
  (copy / "metadata.json").rename(tmp_path / "kept")
  with pytest.raises(ValueError, match=r"not complete.*expected metadata\.json"):
    policy_folder.load_policy(copy)
  metadata = json.loads((tmp_path / "kept").read_text())
  (copy / "metadata.json").write_text('{"step": ')
  with pytest.raises(ValueError, match=r"metadata\.json is corrupt.*expected JSON"):
    policy_folder.policy_hash(copy)
  (copy / "metadata.json").write_text(json.dumps(metadata | {"params_sha256": "0" * 64}))
  with pytest.raises(ValueError, match="not what was saved"):
    policy_folder.load_policy(copy)
  assert_same(policy_folder.load_policy(copy, verify=False).params, params())
  (copy / "params" / "manifest.ocdbt").write_bytes(b"")
  with pytest.raises(ValueError, match="cannot be read.*copy the folder again"):
    policy_folder.load_policy(copy)


def training(seed=0):
  tree = params(seed)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1e-3, 100)))
  train = {"opt": optimizer.init(tree["coupler"]), "count": jnp.asarray(seed), "rng": jax.random.key(seed), "ema": None}
  return {"params": tree, "train": train}


def abstract(trees, sharding=None):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), trees)


def run(workdir, steps=(10, 20, 30), **kwargs):
  with checkpoints.Checkpointer(workdir, **kwargs) as checkpointer:
    for step in steps:
      assert checkpointer.save(step, training(step), {"position": {"step": step}})
  return workdir


def test_a_run_resumes_from_its_newest_checkpoint(tmp_path):
  run(tmp_path, keep_last=2, save_every=10)
  with checkpoints.Checkpointer(tmp_path, keep_last=2, save_every=10) as checkpointer:
    assert checkpointer.steps == [20, 30]
    assert [step for step in range(25) if checkpointer.due(step)] == [10, 20]
    step, trees, values = checkpointer.restore(abstract(training()))
    assert step == 30 and values == {"position": {"step": 30}}
    assert_same(trees, training(30))
    assert checkpointer.restore({"params": abstract(params())}, step=20).trees.keys() == {"params"}
    assert checkpointer.save(30, training(0)) is False
    with pytest.raises(ValueError, match=r"No checkpoint of step 10: got steps \[20, 30\]"):
      checkpointer.restore(abstract(training()), step=10)


def test_checkpoints_at_multiples_of_keep_every_stay(tmp_path):
  run(tmp_path, steps=(10, 20, 30, 40, 50), keep_last=1, keep_every=20)
  with checkpoints.Checkpointer(tmp_path) as checkpointer:
    assert checkpointer.steps == [20, 40, 50]


def test_a_new_run_has_nothing_to_restore(tmp_path):
  with checkpoints.Checkpointer(tmp_path) as checkpointer:
    assert checkpointer.restore(abstract(training())) is None


def test_another_number_of_devices_restores_the_same(tmp_path):
  run(tmp_path, steps=(10,))
  mesh = jax.make_mesh((8,), ("fsdp",))
  with checkpoints.Checkpointer(tmp_path) as checkpointer:
    found = checkpointer.restore(abstract(training(), NamedSharding(mesh, PartitionSpec())))
  assert len(found.trees["params"]["llm"]["embed"].sharding.device_set) == 8
  assert_same(found.trees, training(10))


def test_a_corrupt_checkpoint_is_reported_and_set_aside(tmp_path, caplog):
  run(tmp_path)
  (tmp_path / "checkpoints" / "30" / "train" / "manifest.ocdbt").write_bytes(b"")
  with checkpoints.Checkpointer(tmp_path) as checkpointer:
    with caplog.at_level(logging.ERROR):
      step, trees, _ = checkpointer.restore(abstract(training()))
    assert step == 20 and "CORRUPT CHECKPOINT" in caplog.text
    assert_same(trees, training(20))
    assert checkpointer.steps == [10, 20]
    assert [path.name.partition("-")[0] for path in (tmp_path / "checkpoints_corrupt").iterdir()] == ["30"]
    assert checkpointer.save(30, training(31))
    assert_same(checkpointer.restore(abstract(training())).trees, training(31))


def failing(monkeypatch, *errors):
  """The first reads fail like this, the others go well."""
  left, read = list(errors), checkpoints.Checkpointer._read

  def attempt(self, step, wanted):
    if left:
      raise left.pop(0)
    return read(self, step, wanted)

  monkeypatch.setattr(checkpoints, "_PAUSES", (0.0, 0.0))
  monkeypatch.setattr(checkpoints.Checkpointer, "_read", attempt)


def test_an_error_that_passes_costs_no_checkpoint(tmp_path, monkeypatch, caplog):
  run(tmp_path)
  failing(monkeypatch, ConnectionError("reset by peer"), ValueError("UNAVAILABLE: 503"))
  with checkpoints.Checkpointer(tmp_path) as checkpointer:
    assert checkpointer.restore(abstract(training())).step == 30 and "trying again" in caplog.text
  failing(monkeypatch, *[ValueError("DATA_LOSS: checksum")] * 2)
  with checkpoints.Checkpointer(tmp_path) as checkpointer:
    assert checkpointer.restore(abstract(training())).step == 30
  assert not (tmp_path / "checkpoints_corrupt").exists()


@pytest.mark.parametrize("error", [OSError("Input/output error"), MemoryError(), ValueError("PERMISSION_DENIED: 403")])
def test_what_cannot_be_reached_stops_and_moves_nothing(tmp_path, monkeypatch, error):
  run(tmp_path)
  failing(monkeypatch, *[error] * 3)
  with checkpoints.Checkpointer(tmp_path) as checkpointer:
    with pytest.raises(ValueError, match=r"checkpoints/30 cannot be read: got .*nothing was moved"):
      checkpointer.restore(abstract(training()))
    assert checkpointer.steps == [10, 20, 30]
  failing(monkeypatch, *[ValueError("DATA_LOSS: checksum")] * 3)
  with checkpoints.Checkpointer(tmp_path) as checkpointer:
    assert checkpointer.restore(abstract(training())).step == 20


def test_damage_that_another_process_saw_counts_for_all(tmp_path, monkeypatch, caplog):
  run(tmp_path)
  told = iter([checkpoints._DAMAGED, checkpoints._UNREACHED])
  monkeypatch.setattr(checkpoints, "_worst_of_all", lambda error: next(told))
  message = r"checkpoints/20 cannot be read: got another process could not read it"
  with checkpoints.Checkpointer(tmp_path) as checkpointer, pytest.raises(ValueError, match=message):
    checkpointer.restore(abstract(training()))
  assert "30: damaged on another process" in caplog.text


TWO = """
import sys, pathlib, jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from semanticvla_jax import policy_folder
from semanticvla_jax.train import checkpoints
port, me, folder = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", 2, me)
mesh = jax.make_mesh((4,), ("fsdp",))
where = NamedSharding(mesh, P("fsdp"))
def tree(step):
  whole = np.random.default_rng(step).normal(size=(4, 4096)).astype(np.float32)
  return {"w": jax.make_array_from_callback(whole.shape, where, whole.__getitem__)}
shape = {"train": {"w": jax.ShapeDtypeStruct((4, 4096), np.float32, sharding=where)}}
with checkpoints.Checkpointer(folder) as checkpointer:
  for step in (1, 2):
    checkpointer.save(step, {"train": tree(step)}, {})
  checkpointer.wait()
if me == 1:
  for path in (folder / "checkpoints" / "2" / "train" / "ocdbt.process_1").rglob("d/*"):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
policy_folder.barrier("cut")
with checkpoints.Checkpointer(folder) as checkpointer:
  found = checkpointer.restore(shape)
  print("RESTORED", found.step, checkpointer.steps)
"""


@pytest.mark.processes
def test_two_processes_pass_over_what_one_of_them_cannot_read(tmp_path):
  with socket.create_server(("", 0)) as server:
    port = server.getsockname()[1]
  environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
  both = [
    subprocess.Popen(
      [sys.executable, "-c", TWO, str(port), str(i), str(tmp_path)],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  told = [process.communicate(timeout=600) for process in both]
  for out, errors in told:
    assert "RESTORED 1 [1]" in out, errors
  assert "damaged on another process" in told[0][1] and "CORRUPT CHECKPOINT" in told[1][1]


def test_when_all_are_corrupt_nothing_moves(tmp_path):
  run(tmp_path)
  for step in (10, 20, 30):
    (tmp_path / "checkpoints" / str(step) / "params" / "manifest.ocdbt").write_bytes(b"")
  with checkpoints.Checkpointer(tmp_path) as checkpointer:
    with pytest.raises(ValueError, match="No checkpoint in .* can be read"):
      checkpointer.restore(abstract(training()))
    assert checkpointer.steps == [10, 20, 30]


def test_a_checkpoint_of_another_config_is_refused(tmp_path):
  run(tmp_path, steps=(10, 20))
  wanted = abstract(training())
  wanted["params"]["coupler"] = {"kernel": jax.ShapeDtypeStruct((16, 9), jnp.float32)}
  with checkpoints.Checkpointer(tmp_path) as checkpointer:
    with pytest.raises(ValueError, match=r"another config(.|\n)*\+ params/coupler/kernel \(16, 9\)\n  - .*\(16, 8\)"):
      checkpointer.restore(wanted)
    with pytest.raises(ValueError, match=r"another config(.|\n)*\+ ema/"):
      checkpointer.restore({"ema": abstract(params())})
    assert checkpointer.steps == [10, 20]


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
  tree = {"params": {"w": jnp.arange(1 << 20, dtype=jnp.float32)}}
  expected = np.array(tree["params"]["w"])
  overwrite = jax.jit(lambda x: jax.tree.map(lambda y: y * 0 - 1, x), donate_argnums=0)
  with checkpoints.Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, tree)
    tree = jax.block_until_ready(overwrite(tree))
    found = checkpointer.restore(abstract(tree))
  np.testing.assert_array_equal(found.trees["params"]["w"], expected)
