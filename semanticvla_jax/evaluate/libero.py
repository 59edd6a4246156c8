"""Measures a policy on LIBERO, in its own simulator, and says how.

    python -m semanticvla_jax.evaluate --policy=DIR --suite=libero_object --out=runs/object --workers=2

Run again after an interruption it goes on at the next episode. Everything that changes a success rate is in the
result's fingerprint; `evaluate compare` refuses results that were measured otherwise.

    python -m semanticvla_jax.evaluate --recorded=DEMONSTRATIONS --suite=libero_object --out=runs/proof --trials=2

sends recorded actions through the same path, from the first states that they were recorded from.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import pathlib
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from semanticvla_jax import checkpoint
from semanticvla_jax.data import images, text
from semanticvla_jax.envs import libero, libero_simulator
from semanticvla_jax.envs.process import BrokenEnvironment
from semanticvla_jax.evaluate import controls, protocol, report, visualize
from semanticvla_jax.evaluate.recorded import Recorded
from semanticvla_jax.evaluate.rollout import Episodes
from semanticvla_jax.evaluate.simulators import OnSimulators, Record, Records
from semanticvla_jax.policy import Policy

_VIEWS = ("observation/image", "observation/wrist_image")
_RATE = 20  # control steps a second


class Protocol(NamedTuple):
  """What a community's evaluation fixes besides the simulator.

  Attributes:
    seed: of the resets.
    replay: actions executed of a chunk.
    jpeg_quality: of the round trip that frames take, as stored training frames did; None for none.
  """

  seed: int
  replay: int
  jpeg_quality: int | None


PROTOCOLS = {"openvla": Protocol(0, 8, 95), "openpi": Protocol(7, 5, None)}


class Watch:
  """Keeps what a report shows: films of the first episodes of either outcome, and two moments of one of them.

  On disk at once, so that a resumed evaluation shows what came before, too.

  Args:
    folder: of the report. name: begins the names of its files.
    count: films, half of them failures where there are as many.
    replay: actions between two frames.
  """

  def __init__(self, folder: pathlib.Path, name: str, count: int, replay: int):
    self.folder, self.name, self.count, self.replay = folder, name, count, replay
    self._list, self._moments = folder / f"{name}_films.json", folder / f"{name}_moments.npz"
    self.films = json.loads(self._list.read_text()) if self._list.exists() else []

  def __call__(self, record: Record, seen: list[dict]) -> None:
    """Takes an episode that ended."""
    alike = [film for film in self.films if film["success"] == record.success]
    if record.error is not None or not seen or len(alike) >= -(-self.count // 2):
      return
    if not self._moments.exists() or (record.success and not alike):
      self._keep_moments(record, [seen[0], seen[len(seen) // 2]])
    frames = np.stack([np.stack([one[name] for name in _VIEWS]) for one in seen])
    steps = [min(i * self.replay, record.steps) for i in range(len(seen))]
    path = self.folder / f"{self.name}_{record.seed}_{'done' if record.success else 'not_done'}.mp4"
    pictures = visualize.film(frames, record.told, record.success, record.instruction, steps)
    visualize.write_mp4(path, pictures, fps=max(1, round(_RATE / self.replay)))
    self.films.append(
      {"path": path.name, "told": record.told, "success": record.success, "steps": record.steps, "seed": record.seed}
    )
    self._list.write_text(json.dumps(self.films))

  def shown(self) -> list[report.Film]:
    """The films, successes first."""
    found = [report.Film(**film | {"path": self.folder / film["path"]}) for film in self.films]
    return sorted(found, key=lambda film: (not film.success, film.seed))[: self.count]

  def looked(self, policy: Policy, sentences: Sequence[str]) -> list[report.Scene]:
    """What the policy looked at in the moments kept, as told and told another of `sentences`."""
    if not self._moments.exists():
      return []
    with np.load(self._moments) as file:
      kept = {key: file[key] for key in file.files}
    told, seed = str(kept.pop("told")), int(kept.pop("seed"))
    other = next((sentence for sentence in sentences if sentence != told), told)
    scenes = []
    for i, moment in enumerate(("first frame", "half way")):
      one = {key.replace("|", "/"): value[i] for key, value in kept.items()}
      pair = [{**one, "prompt": sentence} for sentence in (told, other)]
      views = [_large(view) for view in policy.observe(pair[:1]).images[0]]
      looks = visualize.looks(policy, pair)
      labels = ("told", "if it were told instead")
      shown = [(said["prompt"], label, visualize.tiles(views, look)) for said, label, look in zip(pair, labels, looks)]
      scenes.append(report.Scene(f"episode {seed}, {moment}", shown, visualize.cue_tiles(views[0], looks[0])))
      sheet = visualize.sheet([row for _, _, rows in shown for row in rows])
      Image.fromarray(sheet).save(self.folder / f"{self.name}_looks_{moment.replace(' ', '_')}.png")
    return scenes

  def _keep_moments(self, record: Record, moments: list[dict]) -> None:
    arrays = {key.replace("/", "|"): np.stack([one[key] for one in moments]) for key in (*_VIEWS, "observation/state")}
    np.savez(self._moments, told=record.told, seed=record.seed, **arrays)


def _large(view: np.ndarray) -> np.ndarray:
  """A view of the model's size, larger for the eye."""
  return images.resize(view, max(256, view.shape[0]))


class Evaluation:
  """One policy on one suite: simulators, files of finished episodes, rows of the report.

  Args:
    args: of the command line.
    policy: of `load`.
    suite: of LIBERO.
    out: folder of the report.
  """

  def __init__(self, args: argparse.Namespace, policy: Any, suite: str, out: pathlib.Path):
    self.args, self.policy, self.suite, self.out = args, policy, suite, out
    chosen, self.seeds = PROTOCOLS[args.protocol], seeds(args, suite)
    self.settings = settings(args, suite)
    own = policy.metadata.get("jpeg_quality")
    self.jpeg = None if own is not None else chosen.jpeg_quality
    replay = min(chosen.replay, policy.metadata["chunk"]) if args.replay is None else args.replay
    tasks = libero.tasks(suite)
    begun = policy.beginnings if isinstance(policy, Recorded) else None
    self.watch = Watch(out, suite, args.films, replay) if args.films else None
    self.simulators = OnSimulators(
      policy, lambda: libero_simulator.start(self.settings, begun, args.timeout), workers=args.workers, replay=replay,
      group=lambda seed: seed // libero.EPISODES, instruction=lambda seed: tasks[seed // libero.EPISODES].instruction,
      jpeg_quality=self.jpeg, dct=policy.metadata.get("dct", "accurate"),
    )  # fmt: skip
    self.replay = replay

  def fingerprint(self, **changes: Any) -> dict:
    """Of this evaluation, or of a control in it; starts a simulator, to hear what draws."""
    args, settings = self.args, self.settings
    drawn = self.simulators.first().ask("facts", self.seeds[0])
    recorded = isinstance(self.policy, Recorded)
    return protocol.fingerprint(
      self.policy, environment="libero", suite=self.suite,
      split="where the demonstrations began" if recorded else "the benchmark's first states", seeds=self.seeds,
      max_steps=settings.max_steps or libero.MAX_STEPS[self.suite], replay=self.replay, loop="simulators",
      protocol=args.protocol, simulator=libero.versions(), renderer=drawn["renderer"],
      assets=libero.assets_hash(str(libero.find_assets(settings.assets))), first_states=self._states_hash(),
      image={"pixels": settings.size, "rotation": settings.rotation, "jpeg_quality": self.jpeg},
      quaternion=settings.quaternion, seeding=self._seeding(),
      wait_steps=settings.wait_steps, prompt=text.prompt("{instruction}"), **changes,
    )  # fmt: skip

  def _seeding(self) -> dict:
    """What numbers fixtures are placed by."""
    if self.settings.seeding == "environment":
      return {"seed": self.settings.seed, "where": "once, when a task's environment has been made"}
    begun = self.policy.beginnings.values() if isinstance(self.policy, Recorded) else ()
    where = "numpy and random, with (seed, task, trial), before every reset, samplers of earlier ones emptied"
    if any(one.seed is not None for one in begun):
      where = f"numpy with the recording's own seed, samplers as they were, where that is known, else {where}"
    return {"seed": self.settings.seed, "where": where}

  def _states_hash(self) -> str:
    """Of the first states of all episodes."""
    digest = hashlib.sha256()
    for task in sorted({seed // libero.EPISODES for seed in self.seeds}):
      trials = [seed for seed in self.seeds if seed // libero.EPISODES == task]
      own = self.policy.beginnings if isinstance(self.policy, Recorded) else None
      found = libero.first_states(libero.tasks(self.suite)[task]) if own is None else None
      for seed in trials:
        state = found[seed % libero.EPISODES] if own is None else own[seed].state
        digest.update(np.ascontiguousarray(state, np.float64).tobytes())
    return digest.hexdigest()[:16]

  def measure(self) -> report.Row:
    """The policy itself."""
    mark = self._claim(self.fingerprint())
    self.simulators.seen = self.watch
    episodes = self.runner(self.policy, "policy").run(self.seeds)
    self.simulators.seen = None
    name = "recorded actions" if isinstance(self.policy, Recorded) else "this policy"
    return self.row(name, "policy", episodes, mark)

  def controls(self, result: Episodes, names: Sequence[str]) -> list[report.Row]:
    """The policy with one thing taken away at a time."""
    rows, main = [], self.runner(self.policy, "policy")
    for name, (episodes, changes) in controls.run(self.policy, main, result, self.runner, names).items():
      told = {"told": name} if name == controls.NAMES["shuffled"] else {}
      rows.append(self.row(name, "control", episodes, self.fingerprint(model_changes=changes, **told)))
    return rows

  def runner(self, policy: Any, label: str) -> _Runner:
    """Runs a policy in the simulators there are, its finished episodes in files of their own."""
    return _Runner(self, policy, label)

  def row(self, name: str, kind: str, episodes: Episodes, mark: Mapping) -> report.Row:
    """A result with its summary."""
    row = report.Row(name, kind, self.suite, protocol.summary(episodes, str), dict(mark), episodes)
    low, high = (100 * x for x in row.summary["interval"])
    broken = f", {row.summary['errors']} broke" if row.summary["errors"] else ""
    count = f"{episodes.successes}/{episodes.valid}"
    print(f"{self.suite:14} {name:42} {count}  ({low:.0f}–{high:.0f} %){broken}", flush=True)
    return row

  def _claim(self, mark: Mapping) -> dict:
    """Notes the fingerprint, or checks that episodes found here were measured with the same; returns that of all.

    More or fewer episodes are no difference, nor is where the policy lies; sources that differ are all named.
    """
    path, now = self.out / f"{self.suite}_fingerprint.json", json.loads(json.dumps(mark))
    before = json.loads(path.read_text()) if path.exists() else now
    if lines := protocol.unlike(before, now, (*protocol.NOTED, *protocol.COUNTED, "policy.folder")):
      listing = "\n  ".join(lines)
      raise ValueError(
        f"{self.out} holds episodes that were measured otherwise: got\n  {listing}\nexpected the same; choose "
        "another --out."
      )
    parts = [part for each in (before, now) for part in each.get("sources", "").split()]
    now["sources"] = " ".join(dict.fromkeys(parts))
    path.write_text(json.dumps(now, indent=2) + "\n")
    return now


class _Runner:
  """The simulators with one policy, as `controls.run` wants it."""

  def __init__(self, owner: Evaluation, policy: Any, label: str):
    self.owner, self.policy, self.label = owner, policy, label

  def run(self, seeds: Sequence[int] | np.ndarray, told: Sequence[str] | None = None) -> Episodes:
    owner, label = self.owner, self.label if told is None else "shuffled"
    records = Records(owner.out / f"{owner.suite}_{label}.jsonl")
    owner.simulators.policy = self.policy
    return owner.simulators.run(seeds, told, progress(f"{owner.suite} {label}", len(seeds)), records)


def broken(out: pathlib.Path) -> dict[str, dict[int, str]]:
  """The tracebacks of all episodes that broke each time, by file of episodes and number."""
  found = {path.stem: Records(path).found.values() for path in sorted(out.glob("*.jsonl"))}
  errors = {name: {one.seed: one.error for one in records if one.error is not None} for name, records in found.items()}
  return {name: some for name, some in errors.items() if some}


def progress(name: str, total: int) -> Callable[[int, int], None]:
  """Prints, after each episode, how many are done and succeeded, and how long the rest will take."""
  start, first = time.perf_counter(), []

  def show(done: int, successes: int) -> None:
    first.append(done - 1)  # those found are not counted in the rate
    rate = (done - first[0]) / (time.perf_counter() - start)
    left = (total - done) / rate / 60
    print(
      f"{name}: {done}/{total}, {successes} succeeded ({100 * successes / done:.0f} %), {60 * rate:.1f} episodes/min, "
      f"{left:.0f} min left", flush=True,
    )  # fmt: skip

  return show


def seeds(args: argparse.Namespace, suite: str) -> list[int]:
  """The numbers of the episodes asked for: trials 0, 1, … of each task.

  Raises:
    ValueError: there is no such task or trial.
  """
  tasks = libero.task_numbers(args.tasks, suite)
  if not 1 <= args.trials <= libero.EPISODES:
    raise ValueError(
      f"LIBERO: got trials={args.trials}; expected 1 to {libero.EPISODES}, the first states of a task; change --trials."
    )
  return [libero.EPISODES * task + trial for task in tasks for trial in range(args.trials)]


def settings(args: argparse.Namespace, suite: str) -> libero.Settings:
  """The simulator's, from the flags."""
  found = libero.Settings(
    suite, args.assets, seeding=args.seeding, seed=PROTOCOLS[args.protocol].seed, max_steps=args.max_steps,
    rotation=args.rotation, quaternion=args.quaternion, renderer=args.renderer, egl_device=args.egl_device,
  )  # fmt: skip
  libero.check(found)
  return found


def load(args: argparse.Namespace, suite: str) -> Any:
  """The policy, compiled for up to `workers` observations; or recorded actions.

  Raises:
    ValueError: the policy is of another robot, or its statistics are of other suites.
  """
  if args.recorded:
    return Recorded(args.recorded, suite, seeds(args, suite), args.replay or PROTOCOLS[args.protocol].replay)
  sizes = sorted({args.workers, *(2**i for i in range(args.workers.bit_length()))})
  dataset = args.dataset or _dataset([*checkpoint.read_policy_json(args.policy)[1]], suite)
  policy = Policy.load(args.policy, dataset=dataset, dtype=args.dtype, batch_sizes=sizes)
  views, width, actions = policy.bare.num_views, policy.bare.proprio_dim, policy.metadata["action_dim"]
  if views > 2 or width not in (None, 8) or actions != 7:
    raise ValueError(
      f"Policy is of another robot: got {views} views, proprioception of width {width}, {actions} action dimensions; "
      "expected 1 or 2, 8, 7; evaluate a policy trained on LIBERO."
    )
  return policy


def _dataset(names: Sequence[str], suite: str) -> str:
  """Whose statistics, of those that a policy has. Raises ValueError where none is in the suite's units."""
  fits = protocol.fitting(names, suite)
  if not fits:
    raise ValueError(
      f"Policy has no statistics of {suite}: got those of {[*names]}; expected {suite!r} or '{suite}_no_noops', for "
      "actions of another suite are in other units; evaluate the suite that it was trained on, or choose with "
      "--dataset."
    )
  return fits[0]


def run(args: argparse.Namespace, out: pathlib.Path) -> tuple[list, list, list, dict[str, float]]:
  """All measurements: rows, films, scenes, and seconds by stage."""
  rows, films, scenes, seconds = [], [], [], report.Stages()
  timed = seconds.timed
  for suite in args.suite.split(","):
    policy = timed("load", lambda: load(args, suite))  # noqa: B023
    evaluation = Evaluation(args, policy, suite, out)
    try:
      main = timed("evaluate", evaluation.measure)
      rows.append(main)
      if args.controls:
        rows += timed("controls", lambda: evaluation.controls(main.episodes, args.controls.split(",")))  # noqa: B023
    finally:
      evaluation.simulators.close()
    if evaluation.watch is not None:
      films += evaluation.watch.shown()
      sentences = [task.instruction for task in libero.tasks(suite)]
      if isinstance(policy, Policy):
        scenes += timed("pictures", lambda: evaluation.watch.looked(policy, sentences))  # noqa: B023
  return rows, films, scenes, seconds


def arguments(argv: Sequence[str]) -> argparse.Namespace:
  """The flags, read and checked for what does not need the benchmark."""
  parser = argparse.ArgumentParser(
    prog="python -m semanticvla_jax.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--policy", help="policy folder")
  parser.add_argument("--recorded", metavar="DIR", help="instead: LIBERO's HDF5 demonstrations, whose actions are sent")
  parser.add_argument("--suite", required=True, help=f"one or more of {','.join(libero.SUITES)}")
  parser.add_argument("--tasks", help="their numbers, e.g. 0,3 (default: all)")
  parser.add_argument("--trials", type=int, default=50, help="episodes of each task (default: 50, the benchmark's)")
  parser.add_argument("--workers", type=int, default=2, help="simulators at once, about 2 GB each (default: 2)")
  parser.add_argument("--protocol", choices=(*PROTOCOLS,), default="openvla", help="seed, replay, JPEG round trip")
  parser.add_argument("--seeding", choices=libero.SEEDING, default="episode", help="before every reset, or as usual")
  parser.add_argument("--replay", type=int, help="actions executed before asking again (default: the protocol's)")
  parser.add_argument("--max_steps", "--max-steps", type=int, help="of an episode (default: the suite's)")
  parser.add_argument("--assets", help=f"folder (default: ${libero.ASSETS_VARIABLE}, site-packages, ~/.cache/libero)")
  parser.add_argument("--rotation", type=int, default=180, help="of frames, as in the training data (default: 180)")
  parser.add_argument("--quaternion", choices=libero.QUATERNIONS, default="robosuite", help="as in the training data")
  parser.add_argument("--renderer", default="egl", help="egl or osmesa (default: egl)")
  parser.add_argument("--egl-device", "--egl_device", type=int, help="that draws (default: the first that works)")
  parser.add_argument("--timeout", type=float, default=900.0, help="seconds without an answer that count as a crash")
  parser.add_argument(
    "--out", help="folder for the report; one that was interrupted is gone on with (default: runs/<policy>_<suite>)"
  )
  parser.add_argument(
    "--controls", nargs="?", const="shuffled", default="",
    help=f"measure controls too: the shuffled instruction, or some of {','.join(controls.NAMES)}",
  )
  parser.add_argument("--films", type=int, default=6, help="films of each suite (default: 6; 0: no pictures either)")
  parser.add_argument("--metrics", help="metrics.jsonl of the training, for its curves")
  parser.add_argument("--dataset", help="whose statistics to use, where the policy knows several")
  parser.add_argument("--dtype", help="of parameters and computation, e.g. bfloat16 (default: as trained)")
  parser.add_argument("--title", default="What the robot was told, and what it did", help="of the report")
  args = parser.parse_args(argv)
  if (args.policy is None) == (args.recorded is None):
    parser.error("one of --policy and --recorded is needed")
  args.out = args.out or report.folder(args.policy or "recorded", args.suite)
  return args


def main(argv: Sequence[str]) -> None:
  """Measures, writes results.json and report.html, and says where; problems end the program with their message."""
  logging.basicConfig(level=logging.WARNING, format="%(message)s")
  args = arguments(argv)
  command = "python -m semanticvla_jax.evaluate " + shlex.join(argv)
  out = pathlib.Path(args.out)
  try:
    controls.check(args.controls.split(",") if args.controls else ())
    if (out / "results.json").exists():
      raise ValueError(f"Report exists: got {out}; expected a folder without results.json; choose another.")
    metrics = report.read_metrics(args.metrics) if args.metrics else []
    out.mkdir(parents=True, exist_ok=True)
    rows, films, scenes, seconds = run(args, out)
  except (ValueError, BrokenEnvironment) as error:
    sys.exit(str(error))
  except KeyboardInterrupt:
    sys.exit(f"Interrupted; the same command goes on at the next episode. Finished ones are in {out}.")
  found = report.results(rows, command, seconds) | {"broken": broken(out)}
  (out / "results.json").write_text(json.dumps(found, indent=2) + "\n")
  page = report.write(
    out / "report.html", title=args.title, rows=rows, films=films, scenes=scenes, metrics=metrics, command=command,
    seconds=seconds, film_note="a frame for each time the policy looked, at about real speed",
  )  # fmt: skip
  print(f"report: {page.resolve()}")
