"""An environment in a process of its own: started fresh, watched, killed and started again.

Simulators want that: OpenGL contexts cannot share a process with TensorFlow or with each other, and a simulator that
crashes must not take the evaluation with it. The process is started as
`python -m semanticvla_jax.envs.subprocess_env`, never forked, so that it imports what its environment needs and
nothing else.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from semanticvla_jax.errors import refuse

LOGGER = logging.getLogger(__name__)  # what an environment tells it is heard on the other side
_TAIL = 4000  # characters of what a dead process printed last


class BrokenEnvironment(RuntimeError):
  """An environment broke: its message holds the traceback of its process, or what that printed last."""


def environment(changes: Mapping[str, str | None]) -> dict[str, str]:
  """This process's variables for another one, some set to other values or, where that is None, taken away."""
  return {name: value for name, value in {**os.environ, **changes}.items() if value is not None}


class StepResult(NamedTuple):
  """The state of an episode.

  Attributes:
    observations: dicts, see `envs.base.Environment`: what was rendered since the last moment, the newest last.
    steps: actions taken since the episode began.
    success, done: of the current state.
    instruction: of the episode.
  """

  observations: list[dict]
  steps: int
  success: bool
  done: bool
  instruction: str


class Host:
  """Runs inside the process: one environment, and the episode it is in."""

  def __init__(self, environment: Any):
    self.environment, self.steps = environment, 0

  def reset(self, seed: int) -> StepResult:
    """Begins episode `seed`."""
    observation = self.environment.reset(seed)
    self.steps = 0
    return self._moment([observation], False)

  def act(self, actions: Float[np.ndarray, "n a"], every: bool, on: bool, look: bool = True) -> StepResult:
    """Executes actions until they are used up or, without `on`, the episode is over.

    Renders all (`every`), one (`look`), or none.
    """
    seen, done = [], False
    for i, action in enumerate(actions):
      observation, done = self.environment.step(action, observe=every or (look and i == len(actions) - 1))
      self.steps += 1
      over = done and not on
      if observation is None and over and look:
        observation = self.environment.observe()
      seen += [] if observation is None else [observation]
      if over:
        break
    return self._moment(seen, done)

  def call(self, name: str, *args: Any) -> Any:
    """Any other method of the environment."""
    return getattr(self.environment, name)(*args)

  def _moment(self, seen: list[dict], done: bool) -> StepResult:
    return StepResult(seen, self.steps, bool(self.environment.success), bool(done), self.environment.instruction)


class Process:
  """The other side: an environment that lives elsewhere, with `Environment`'s methods and their halves.

  `begin`, `act` and `ask` return at once; `receive` waits for what comes of them; `connection` can be waited for
  together with others (multiprocessing.connection.wait).

  Args:
    make: returns the environment; picklable (a class with its arguments in a functools.partial), for it is called in
      the process.
    variables: of the process's environment, in addition to those of this one; None removes one of these.
    timeout: seconds after which a process that does not answer counts as broken.
  """

  def __init__(
    self, make: Callable[[], Any], variables: Mapping[str, str | None] | None = None, timeout: float = 900.0
  ):
    self._make, self._variables, self.timeout = make, dict(variables or {}), timeout
    self._log = tempfile.TemporaryFile(prefix="environment_")  # noqa: SIM115, closed with the process
    self._moment: StepResult | None = None
    self.connection, self._process = self._start()

  @property
  def pid(self) -> int:
    """Of the process that runs now."""
    return self._process.pid

  @property
  def instruction(self) -> str:
    """What is asked in the current episode."""
    return self._current().instruction

  @property
  def success(self) -> bool:
    """Whether the current state fulfils the instruction."""
    return self._current().success

  def reset(self, seed: int) -> dict:
    """Starts episode `seed` and waits for its first observation."""
    self.begin(seed)
    return self.receive().observations[-1]

  def step(self, action: np.ndarray, observe: bool = True) -> tuple[dict | None, bool]:
    """Acts once and waits; returns (observation, done), None for the observation where nothing is to be rendered."""
    self.act(np.asarray(action)[None], look=observe)
    moment = self.receive()
    return (moment.observations[-1] if moment.observations else None), moment.done

  def observe(self) -> dict:
    """The current observation, rendered now."""
    return self.ask("observe")

  def begin(self, seed: int) -> None:
    """Asks for episode `seed`."""
    self._send("reset", int(seed))

  def act(self, actions: Float[np.ndarray, "n a"], every: bool = False, on: bool = False, look: bool = True) -> None:
    """Asks for actions to be executed.

    Args:
      actions: one after the other, until the episode is over.
      every: True renders an observation after each of them instead of after the last.
      on: True goes on when the episode is over.
      look: False renders none of them, unless `every`.
    """
    self._send("act", np.asarray(actions), every, on, look)

  def ask(self, name: str, *args: Any) -> Any:
    """Calls another method of the environment and waits for what it returns."""
    self._send("call", name, *args)
    return self.receive()

  def receive(self) -> Any:
    """Waits for the answer to what was asked.

    Raises:
      BrokenEnvironment: the environment raised, died, or took more than `timeout` seconds.
    """
    try:
      if not self.connection.poll(self.timeout):
        raise BrokenEnvironment(f"No answer from the environment within {self.timeout:g} s.{self._printed()}")
      kind, answer, log = self.connection.recv()
    except (EOFError, ConnectionError) as error:
      raise BrokenEnvironment(f"The environment's process {self._how_it_ended()}.{self._printed()}") from error
    for level, message in log:
      LOGGER.log(level, message)
    if kind == "error":
      raise BrokenEnvironment(answer)
    if isinstance(answer, StepResult):
      self._moment = answer
    return answer

  def restart(self) -> None:
    """Kills the process, busy or not, and starts another."""
    self.close()
    self._log = tempfile.TemporaryFile(prefix="environment_")  # noqa: SIM115
    self.connection, self._process = self._start()

  def close(self) -> None:
    """Ends the process."""
    self.connection.close()
    self._process.kill()
    self._process.wait()
    self._log.close()

  def _send(self, *message: Any) -> None:
    try:
      self.connection.send(message)
    except (BrokenPipeError, ConnectionError, OSError):
      return  # it died; `receive` says how

  def _start(self) -> tuple[Connection, subprocess.Popen]:
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", __name__, str(theirs.fileno())]
    with theirs, warnings.catch_warnings():  # jax warns of forks; this child becomes python at once
      warnings.filterwarnings("ignore", r"os\.fork\(\) was called")
      subprocess_env = subprocess.Popen(
        command,
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=self._log,
        stderr=self._log,
        env=environment(self._variables),
      )
    connection = Connection(ours.detach())
    connection.send(self._make)
    return connection, subprocess_env

  def _how_it_ended(self) -> str:
    try:
      code = self._process.wait(10)
    except subprocess.TimeoutExpired:
      return "closed its connection"
    return f"was ended by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"ended with status {code}"

  def _printed(self) -> str:
    self._log.seek(0)
    text = self._log.read().decode(errors="replace").strip()[-_TAIL:]
    return f" It printed last:\n{text}" if text else " It printed nothing."

  def _current(self) -> StepResult:
    if self._moment is None:
      raise refuse("Environment", "no running episode", "reset(seed) before anything else", "call reset first")
    return self._moment


class _BufferedLogHandler(logging.Handler):
  """Keeps (level, message) of what is logged until the next answer takes it along."""

  def __init__(self):
    super().__init__()
    self.waiting: list[tuple[int, str]] = []

  def emit(self, record: logging.LogRecord) -> None:
    self.waiting.append((record.levelno, record.getMessage()))

  def take(self) -> list[tuple[int, str]]:
    """What waits; nothing does afterwards."""
    taken, self.waiting = self.waiting, []
    return taken


def serve(connection: Connection) -> None:
  """Answers until the other side is gone: first how to make the environment, then (method of Host, arguments)."""
  log = _BufferedLogHandler()
  LOGGER.addHandler(log)
  try:
    make, host = connection.recv(), None
    while True:
      name, *args = connection.recv()
      try:
        host = Host(make()) if host is None else host
        kind, answer = "done", getattr(host, name)(*args)
      except Exception:  # of any kind: the other side has to know of it
        kind, answer = "error", traceback.format_exc()
      connection.send((kind, answer, log.take()))
  except (EOFError, ConnectionError):
    return


def main(argv: list[str]) -> None:
  """The process: `argv` is the number of an open socket."""
  faulthandler.enable()
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the evaluation hears of it and ends this process
  serve(Connection(int(argv[0])))
  os._exit(0)  # OpenGL contexts do not survive an orderly end


if __name__ == "__main__":
  from semanticvla_jax.envs import subprocess_env  # not this copy of it: what is sent is pickled by name

  subprocess_env.main(sys.argv[1:])
