"""The core: batches across clients, deadlines, back-pressure, failures; nothing blocks the event loop."""

import asyncio
import threading
import time

import numpy as np
import pytest
from serving import Slow, equal, observation, robot, serving

from semanticvla_jax.serve import limits, wire
from semanticvla_jax.serve.core import Core, Refused, Settings


@pytest.fixture
def slow(policy):
  return Slow(policy)


def run(policy, work, limit="off", **settings):
  """Runs a coroutine of a started core."""
  core = Core(policy, Settings(**{"max_batch": 4} | settings), limits.ActionLimit(policy.stats.action, limit))
  core.start()
  try:
    return asyncio.run(asyncio.wait_for(work(core), 60))
  finally:
    core.close()


def test_what_waits_is_answered_in_one_batch_and_each_gets_its_own(slow, policy):
  async def work(core):
    first = asyncio.create_task(core.infer(observation(0), session="0"))
    while not slow.calls:
      await asyncio.sleep(0.01)
    rest = [asyncio.create_task(core.infer(observation(i), session=str(i))) for i in range(1, 6)]
    while core.depth < 5:
      await asyncio.sleep(0.01)
    slow.release.set()
    return await asyncio.gather(first, *rest)

  answers = run(slow, work)
  assert slow.calls == [1, 4, 1]
  assert equal(answers[0].actions, policy.infer(observation(0))["actions"])
  together = {one.row: seed for seed, one in enumerate(answers) if one.batch == 2}
  expected = policy.infer_batch([observation(together[row]) for row in range(4)])
  assert all(equal(answers[together[row]].actions, expected[row]["actions"]) for row in range(4))


def test_a_lone_client_is_not_kept_waiting_and_active_ones_are_batched(policy):
  async def work(core):
    seconds = []
    for _ in range(3):
      seconds.append((await core.infer(observation(), session="0")).seconds["queue"])
    both = [await asyncio.gather(*(core.infer(observation(), session=str(i)) for i in range(2))) for _ in range(3)]
    return seconds, both[-1]

  alone, both = run(policy, work, max_wait=3.0)
  assert max(alone) < 1.0
  assert both[0].batch == both[1].batch


def test_too_many_requests_are_refused_at_once(slow):
  async def work(core):
    tasks = [asyncio.create_task(core.infer(observation(), session="0")) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(Refused) as refused:
      await core.infer(observation(), session="1")
    slow.release.set()
    await asyncio.gather(*tasks)
    return refused.value, await core.infer(observation(), session="1")

  refused, answer = run(slow, work, depth=3)
  assert (refused.kind, refused.status) == ("overloaded", 503) and refused.retry_after > 0
  assert answer.actions.shape == (8, 7)


def test_what_waited_longer_than_the_deadline_is_not_computed(slow):
  async def work(core):
    first = asyncio.create_task(core.infer(observation(), session="0"))
    while not slow.calls:
      await asyncio.sleep(0.01)
    second = asyncio.create_task(core.infer(observation(), session="1"))
    await asyncio.sleep(0.5)
    slow.release.set()
    with pytest.raises(Refused, match="longer than 200 ms") as refused:
      await second
    await first
    return refused.value

  assert run(slow, work, deadline=0.2).status == 504
  assert slow.calls == [1]


def test_a_failure_of_the_device_is_one_batch_s(slow, policy):
  async def work(core):
    slow.fails = True
    with pytest.raises(Refused, match="the policy failed") as refused:
      await core.infer(observation(), session="0")
    assert "fire" not in str(refused.value)
    slow.fails = False
    slow.release.set()
    return await core.infer(observation(), session="0")

  assert equal(run(slow, work).actions, policy.infer(observation())["actions"])


def test_actions_that_are_not_finite_never_leave(policy):
  class Broken(Slow):
    def device_step(self, prepared):
      return np.full((1, 8, 7), np.nan, np.float32)

  async def work(core):
    with pytest.raises(Refused, match="not finite") as refused:
      await core.infer(observation(), session="0")
    return refused.value.kind

  assert run(Broken(policy), work) == "unsafe"


def test_actions_outside_the_training_data(policy):
  class Wide(Slow):
    def device_step(self, prepared):
      return np.full((1, 8, 7), 40.0, np.float32)

  async def ask(core):
    return await core.infer(observation(), session="0", gripper="raw")

  stats = policy.stats.action
  free, clipped = run(Wide(policy), ask).actions, run(Wide(policy), ask, "clip").actions
  assert (free[:, :6] > stats.max[:6]).all() and equal(clipped[0, :6], stats.max[:6])
  assert equal(clipped[:, 6], free[:, 6])  # the gripper has no range
  with pytest.raises(Refused, match="8 of 8 actions are outside"):
    run(Wide(policy), ask, "refuse")


def test_the_event_loop_answers_while_the_device_is_busy(slow):
  import httpx

  with serving(slow, Settings(max_batch=4)) as (_, port), robot(port) as one:
    thread = threading.Thread(target=one.ask, args=[observation()])
    thread.start()
    while not slow.calls:
      time.sleep(0.01)
    assert httpx.get(f"http://127.0.0.1:{port}/healthz").text == "OK"
    with robot(port) as other:
      assert other.metadata["views"]
    slow.release.set()
    thread.join()


def test_a_client_that_left_costs_the_next_one_nothing(slow, policy):
  with serving(slow, Settings(max_batch=4)) as (_, port):
    with robot(port) as leaving:
      leaving.socket.send(wire.pack(observation(1)))
      while not slow.calls:
        time.sleep(0.01)
    slow.release.set()
    with robot(port) as one:
      assert equal(one.ask(observation())["actions"], policy.infer(observation())["actions"])
