"""A benchmark of vla-eval: shows the server what `serving.observation` shows, and writes down what it was given."""

import json
import os

import numpy as np
from serving import observation
from vla_eval.benchmarks.base import StepBenchmark, StepResult

STEPS = 10


class Echo(StepBenchmark):
  render_backends = frozenset({"gpu", "cpu"})

  def __init__(self, send_state: bool = False, send_wrist_image: bool = False):
    super().__init__()
    self._sends = {"state": send_state, "wrist": send_wrist_image}

  def get_tasks(self):
    return [{"name": "echo"}]

  def get_metadata(self):
    return {"max_steps": STEPS}

  def reset(self, task):
    self._taken = []
    return None

  def step(self, action):
    self._taken.append(np.asarray(action["actions"]).tolist())
    return StepResult(None, 0.0, len(self._taken) == STEPS, {})

  def make_obs(self, raw, task):
    image, wrist, state, prompt = observation(len(self._taken)).values()
    seen = {"images": {"agentview": image}, "task_description": prompt}
    if self._sends["wrist"]:
      seen["images"]["wrist"] = wrist
    return seen | ({"states": state} if self._sends["state"] else {})

  def get_step_result(self, result):
    with open(os.environ["ECHO"], "w", encoding="utf-8") as file:
      json.dump(self._taken, file)
    return {"success": True}
