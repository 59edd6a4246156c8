"""Episodes on the device and on the host are the same episodes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import policies
import pytest
from point import Point

from semanticvla_jax.envs.subprocess_env import BrokenEnvironment
from semanticvla_jax.evaluate.rollout import OnDevice, OnHost, simulate
from semanticvla_jax.policy import Policy
from semanticvla_jax.tabletop import physics, tasks

REPLAY, MAX_STEPS, SEEDS = 2, 40, range(12)


def pick(state: tasks.State) -> jax.Array:
  """Over the target, down, close, up: the expert in six lines (and quick to compile)."""
  target, held = state.center[0], state.held == 0
  over = jnp.linalg.norm(target[:2] - state.position[:2]) < 0.008
  goal = target.at[2].set(jnp.where(held, 0.2, jnp.where(over, target[2], 0.12)))
  close = held | (over & (jnp.abs(state.position[2] - target[2]) < 0.008))
  move = jnp.clip((goal - state.position) / physics.TRANSLATION, -1, 1)
  turn = jnp.where(held, 0.0, jnp.clip((state.yaw[0] - state.rotation[2]) / physics.ROTATION, -1, 1))
  return jnp.concatenate([move, jnp.stack([0 * turn, 0 * turn, turn, jnp.where(close, 1.0, -1.0)])])


def scripted(states: tasks.State, told: jax.Array, memory: None = None) -> tuple[jax.Array, None]:
  """Told 0: pick, then hold still; told 1: nothing; told 2: a broken second action. f32[b 3 7]."""
  actions = jax.vmap(pick)(states)[:, None] * jnp.array([1.0, 0.0, 0.0])[:, None]
  actions = actions.at[:, 1:, 6].set(actions[:, :1, 6])
  actions = jnp.where(told[:, None, None] == 1, 0.0, actions)
  return jnp.where((told[:, None, None] == 2) & (jnp.arange(3) >= 1)[:, None], jnp.nan, actions), memory


@functools.cache
def on_device() -> tuple:
  told = jnp.array(SEEDS) % 3

  @jax.jit
  def run(seeds):
    states = jax.vmap(lambda seed: tasks.reset(tasks.seed_key(seed, "heldout"), "pick", "heldout"))(seeds)
    return simulate(scripted, states, told, max_steps=MAX_STEPS, replan_steps=REPLAY, keep_states=True)

  return jax.tree.map(np.asarray, run(jnp.array(SEEDS)))


class Scripted:
  """The same on the host; it looks at the environment's state."""

  replan_steps = REPLAY

  def __init__(self, environment):
    self.environment = environment
    self.resets, self.asked = 0, 0
    self._plan = jax.jit(lambda state, told: scripted(jax.tree.map(lambda x: x[None], state), told)[0][0])

  def reset(self):
    self.resets += 1

  def infer(self, observation):
    assert {"observation/image", "observation/state"} <= observation.keys()
    self.asked += 1
    return {"actions": np.asarray(self._plan(self.environment.state, jnp.array([int(observation["prompt"])])))}


@pytest.fixture(scope="module")
def environment():
  return physics.TabletopEnvironment("pick", split="heldout", size=32)


def test_an_episode_ends_with_success_or_at_the_last_step_or_at_a_broken_action():
  ended, _ = on_device()
  kind = np.array(SEEDS) % 3
  assert ended.success[kind == 0].all() and not ended.success[kind != 0].any()
  assert (ended.steps[kind == 1] == MAX_STEPS).all() and (ended.steps[kind == 0] < MAX_STEPS).all()
  assert (ended.steps[kind == 2] == 1).all() and ended.nonfinite.tolist() == (kind == 2).tolist()


def test_the_host_loop_gives_the_same_episodes(environment):
  ended, _ = on_device()
  policy = Scripted(environment)
  assert environment.max_steps == MAX_STEPS
  episodes = OnHost(policy, environment).run(SEEDS, [str(i % 3) for i in SEEDS])
  np.testing.assert_array_equal(episodes.success, ended.success)
  np.testing.assert_array_equal(episodes.steps, ended.steps)
  np.testing.assert_array_equal(episodes.nonfinite, ended.nonfinite)
  assert not episodes.error.any()
  assert policy.resets == len(SEEDS)
  assert policy.asked == sum(-(-(int(steps) + bad) // REPLAY) for steps, bad in zip(ended.steps, ended.nonfinite))
  assert episodes.told == [str(i % 3) for i in SEEDS] and episodes.instruction[0].startswith("pick up the ")
  assert (episodes.successes, episodes.valid, episodes.spoilt) == (4, 12, 4)


def test_kept_states_are_the_episode():
  ended, states = on_device()
  assert states.time.shape == (MAX_STEPS + 1, len(SEEDS))
  np.testing.assert_array_equal(states.time[-1], ended.steps)
  i, steps = 0, int(ended.steps[0])
  around = jax.tree.map(lambda x: x[steps - 1 : steps + 1, i], states)
  assert jax.jit(jax.vmap(physics.success))(around).tolist() == [False, True]
  np.testing.assert_array_equal(states.center[steps, i], states.center[-1, i])


def chunk_by_chunk(policy, environment, states, steps, replan_steps):
  """Where the host's own loop goes from each state in which the policy is asked: its states, and those expected.

  From query to query, because rounding grows over an episode: a random policy answers a grey level with centimeters.
  """
  for first in range(0, steps, replan_steps):
    environment.state = jax.tree.map(lambda x: jnp.asarray(x[first]), states)  # noqa: B023
    actions = policy.infer(environment.observe())["actions"][: min(replan_steps, steps - first)]
    for t, action in enumerate(actions, first + 1):
      environment.step(action, observe=False)
      yield environment.state, jax.tree.map(lambda x: x[t], states)  # noqa: B023


@pytest.fixture(scope="module")
def device():
  return OnDevice(policies.policy(config=policies.CROPPING), "pick", "heldout", batch=4, keep_states=True)


def test_a_policy_acts_the_same_on_device_and_host(device, environment):
  seeds = range(6)  # more than a batch
  calls = []
  episodes = device.run(seeds, progress=lambda *numbers: calls.append(numbers))
  assert [done for done, _ in calls] == [4, 6] and len(episodes.success) == 6
  policy = policies.policy(config=policies.CROPPING, batch_sizes=(1,))
  host = OnHost(policy, environment)
  for i in (0, 5):
    one = host.run([i])
    assert one.instruction == [episodes.instruction[i]] == [episodes.told[i]]
    assert (one.success[0], one.steps[0]) == (episodes.success[i], episodes.steps[i])
    path = jax.tree.map(lambda x: x[: one.steps[0] + 1, i], episodes.states)  # noqa: B023
    for state, expected in chunk_by_chunk(policy, environment, path, int(one.steps[0]), host.replan_steps):
      jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), state, expected)
    assert np.ptp(path.position, axis=0).min() > 0.01, "the policy moves"


@pytest.mark.slow
def test_a_policy_that_remembers_acts_the_same_on_device_and_host(environment):
  """Its memory goes through the scan, each episode's its own, and begins anew with every `run`."""
  device = OnDevice(policies.remembering(), "pick", "heldout", batch=2, keep_states=True)
  states = device.run([0, 5]).states
  for a, b in zip(jax.tree.leaves(states), jax.tree.leaves(device.run([5, 0]).states)):
    np.testing.assert_array_equal(a, b[:, ::-1])
  policy = policies.remembering(batch_sizes=(1,))
  forgetting = policies.remembering()
  forgetting.inference = policy.inference
  forgetting.infer_batch = lambda *args: forgetting.reset() or Policy.infer_batch(forgetting, *args)
  off: dict[Policy, list] = {policy: [], forgetting: []}
  for one, found in off.items():
    for i in range(2):
      one.reset()
      path = jax.tree.map(lambda x: x[:, i], states)  # noqa: B023
      for state, expected in chunk_by_chunk(one, environment, path, MAX_STEPS, 8):
        found.append(
          max(np.abs(state.position - expected.position).max(), np.abs(state.rotation - expected.rotation).max())
        )
  assert max(off[policy]) < 1e-5 and max(off[forgetting]) > 1e-3, "float32's rounding; what is remembered matters"


def test_a_policy_that_gives_no_number_fails_on_device_and_is_in_the_rate():
  one = policies.policy(config=policies.CROPPING)
  one.params = jax.tree.map(lambda x: x * np.nan, one.params)
  episodes = OnDevice(one, "pick", "heldout", batch=4, keep_states=True).run(range(6))
  assert episodes.nonfinite.all() and not episodes.error.any() and not episodes.success.any()
  assert (episodes.valid, episodes.spoilt, episodes.steps.tolist()) == (6, 6, [0] * 6)


class Still:
  """Walks there in four steps, unless a seed has actions of its own."""

  replan_steps = 3

  def __init__(self, actions=None):
    self.actions = actions or {}

  def reset(self):
    pass

  def infer(self, observation):
    walk = np.tile(np.float32([0.25, 0, 0, 0, 0, 0, 1]), (8, 1))
    return {"actions": self.actions.get(int(observation["observation/state"][0]), walk)}


@pytest.mark.parametrize("trouble", ["raise", "nan"])
def test_an_environment_that_breaks_on_the_host_is_an_error_of_that_episode_alone(trouble, tmp_path, caplog):
  host = OnHost(Still(), Point(str(tmp_path / "log"), {1: trouble}), instruction=lambda seed: f"goal {seed}")
  host.policy.replan_steps = host.replan_steps = 1
  episodes = host.run([0, 1, 2], progress=lambda *numbers: None)
  assert episodes.error.tolist() == [False, True, False] and (episodes.valid, episodes.broken, host.broken) == (2, 1, 1)
  assert episodes.instruction[1] == "go to goal 0" and "Episode 1 broke after" in caplog.text


def test_a_reset_that_breaks_keeps_its_sentence(tmp_path):
  class Closed(Point):
    def reset(self, seed):
      raise BrokenEnvironment("no display")

  episodes = OnHost(Still(), Closed(str(tmp_path / "log")), instruction=lambda seed: f"goal {seed}").run([4])
  assert episodes.error.all() and episodes.instruction == episodes.told == ["goal 4"]


def test_what_a_policy_raises_is_no_broken_environment(tmp_path):
  class Refusing(Still):
    def infer(self, observation):
      raise ValueError("Observation lacks 'state'")

  with pytest.raises(ValueError, match="lacks 'state'"):
    OnHost(Refusing(), Point(str(tmp_path / "log"))).run([0])


def test_no_actions_end_an_episode_and_numbers_that_are_none_fail_it(tmp_path):
  odd = {1: np.zeros((0, 7)), 2: np.full((8, 7), np.nan), 3: np.array([[0.0] * 7, [-np.inf] * 7, [0.0] * 7])}
  episodes = OnHost(Still(odd), Point(str(tmp_path / "log"))).run(range(4))
  assert episodes.success.tolist() == [True, False, False, False] and not episodes.error.any()
  assert episodes.nonfinite.tolist() == [False, False, True, True] and episodes.steps.tolist() == [4, 0, 0, 1]
  with pytest.raises(ValueError, match="replan_steps=0; expected at least 1"):
    OnHost(Still(), Point(str(tmp_path / "log")), replan_steps=0)


def test_what_a_policy_is_told_changes_what_it_does(device):
  seeds = range(4)
  own = device.run(seeds)
  other = [next(x for x in tasks.instructions("pick") if x != sentence) for sentence in own.instruction]
  told = device.run(seeds, other)
  assert told.instruction == own.instruction and told.told == other
  assert (np.abs(told.states.position[8] - own.states.position[8]).max(axis=-1) > 1e-4).all()
  again = device.run(seeds, own.instruction)
  np.testing.assert_array_equal(again.states.position, own.states.position)
  with pytest.raises(ValueError, match="sentence of another suite"):
    device.run([0], ["push the red cube to the left"])


@pytest.mark.parametrize("seeds", [[-5, 0], [499_999_999, 500_000_000]])
def test_seeds_of_another_split_are_refused_before_anything_runs(seeds, device, environment):
  with pytest.raises(ValueError, match="outside split 'heldout'; expected 0 to 499999999"):
    device.run(seeds, progress=lambda *_: pytest.fail("an episode ran"))
  with pytest.raises(ValueError, match="outside split 'heldout'; expected 0 to 499999999"):
    environment.reset(seeds[0] if seeds[0] < 0 else seeds[1])


def test_policies_that_do_not_fit_say_why():
  with pytest.raises(ValueError, match="replan_steps=9; expected 1 to 8"):
    OnDevice(policies.policy(), "pick", replan_steps=9)
  with pytest.raises(ValueError, match="gripper='raw'"):
    OnDevice(policies.policy(gripper="raw"), "pick")
  jpeg = policies.CONFIG | {"data": policies.DATA | {"jpeg_quality": 95}}
  with pytest.raises(ValueError, match="Policy sees JPEGs"):
    OnDevice(policies.policy(config=jpeg), "pick")
  with pytest.raises(ValueError, match="did you mean 'pick'"):
    OnDevice(policies.policy(), "pik")
