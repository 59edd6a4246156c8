"""What can be known of an evaluation on LIBERO before a simulator starts: flags, policy, initial states, the folder."""

from __future__ import annotations

import argparse
import json
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from semanticvla_jax import policy_folder
from semanticvla_jax.data import robot, statistics
from semanticvla_jax.errors import refuse
from semanticvla_jax.evaluate import controls, folder, served
from semanticvla_jax.evaluate.evaluation import check_minimum
from semanticvla_jax.evaluate.rollout import check_grippers
from semanticvla_jax.evaluate.visualize import check_prunes
from semanticvla_jax.libero import suites
from semanticvla_jax.libero.protocols import PROTOCOLS, fitting
from semanticvla_jax.models.semanticvla import build
from semanticvla_jax.policy import Policy


def seeds(args: argparse.Namespace, suite: str) -> list[int]:
  """The numbers of the episodes asked for: trials 0, 1, … of each task.

  Raises:
    ValueError: there is no such task or trial.
  """
  tasks = suites.task_numbers(args.tasks, suite)
  if not 1 <= args.trials <= suites.EPISODES:
    raise refuse(
      "LIBERO",
      f"trials={args.trials}",
      f"1 to {suites.EPISODES}, a task's initial states",
      "change --trials",
    )
  return [suites.EPISODES * task + trial for task in tasks for trial in range(args.trials)]


def settings(args: argparse.Namespace, suite: str) -> suites.Settings:
  """The simulator's settings, from the flags."""
  found = suites.Settings(
    suite,
    args.assets,
    seeding=args.seeding,
    seed=PROTOCOLS[args.protocol].seed,
    max_steps=args.max_steps,
    rotation=args.rotation,
    quaternion=args.quaternion,
    renderer=args.renderer,
    egl_device=args.egl_device,
    objects=args.grounding,
  )
  suites.check(found)
  return found


def check(args: argparse.Namespace, load: Callable[[argparse.Namespace, str], Any]) -> None:
  """Checks what can be known before an episode, for all suites.

  Args:
    args: of the command line; `suite` is a list.
    load: loads what acts on a suite; called for recorded actions, to find those that are missing.

  Raises:
    ValueError: something does not exist, does not fit, or cannot be measured.
  """
  _check_flags(args)
  for suite in args.suite:  # what needs no simulator
    settings(args, suite)
    if args.policy:
      _check_policy(args, suite)
  for suite in args.suite:
    tasks, numbers = suites.tasks(suite), seeds(args, suite)
    if args.recorded:
      load(args, suite)
      continue
    if "shuffled" in args.controls:
      controls.shuffle([tasks[seed // suites.EPISODES].instruction for seed in numbers])
    _check_states(suite, numbers)
  _check_assets(args)
  if args.policy:
    _report_skipped(args.policy, args.controls)


def _check_flags(args: argparse.Namespace) -> None:
  if (args.policy is None) == (args.recorded is None):
    raise refuse(
      "LIBERO",
      f"--policy={args.policy} and --recorded={args.recorded}",
      "one of --policy and --recorded",
      "give one of the two",
    )
  if args.controls and args.recorded:
    raise refuse("Controls", f"{args.controls} with --recorded", "a policy, because they change it", "leave them out")
  if args.grounding:
    if args.recorded or served.is_url(args.policy):
      got = "--recorded" if args.recorded else "a policy behind a server"
      raise refuse("--grounding", got, "a policy folder", "leave one of the two out")
    check_prunes(build(policy_folder.read_policy_json(args.policy).config["model"]))
  check_minimum(args, {"workers": 1})
  if args.timeout <= 0:
    raise refuse("--timeout", f"{args.timeout:g}", "more than 0 seconds", "raise it")


def _check_policy(args: argparse.Namespace, suite: str) -> None:
  """Raises ValueError unless a policy has statistics of a suite and is for LIBERO's robot; reads no parameters."""
  views, width, actions, chunk = _shapes_served(args, suite) if served.is_url(args.policy) else _shapes(args, suite)
  if views > 2 or width not in (None, 8) or actions != 7:
    raise refuse(
      "Policy is for another robot",
      f"{views} views, proprioception of width {width}, {actions} action dimensions",
      "1 or 2, 8, 7",
      "evaluate a policy trained on LIBERO",
    )
  if args.replan_steps is not None and args.replan_steps > chunk:
    raise refuse("Evaluation", f"replan_steps={args.replan_steps}", f"1 to {chunk}, the policy's chunk", "lower it")


def asked(args: argparse.Namespace, suite: str) -> dict[int, str]:
  """The sentences of the tasks that are evaluated, by task."""
  tasks = suites.tasks(suite)
  return {task: tasks[task].instruction for task in sorted({seed // suites.EPISODES for seed in seeds(args, suite)})}


def check_sentences(policy: Policy, suite: str, sentences: Mapping[int, str]) -> None:
  """Raises ValueError for sentences of a suite, by task, that are too long for a policy."""
  errors = {}
  for task, sentence in sentences.items():
    try:
      policy.tokenizers.prompt([sentence])
      if policy.bare.text is not None:
        policy.tokenizers.instruction([sentence])
    except ValueError as error:
      errors[task] = error
  if errors:
    raise refuse(
      f"Sentences of {suite}",
      f"too long ones in tasks {[*errors]} ({next(iter(errors.values()))})",
      "what this policy can read",
      "leave these tasks out with --tasks",
    )


def _shapes(args: argparse.Namespace, suite: str) -> tuple[int, int | None, int, int]:
  """Views, width of the proprioception and of the actions, and chunk of a policy folder."""
  config, entries, _ = policy_folder.read_policy_json(args.policy)
  dataset = args.dataset or dataset_for([*entries], suite)
  stats = statistics.select({name: statistics.from_openvla(one, name) for name, one in entries.items()}, dataset)
  if (own := robot.select(config, dataset)) is not None:
    check_grippers(own.grippers, "LIBERO")
  model = build(config["model"])
  return model.num_views, model.proprio_dim, len(stats.action.mask), model.chunk


def _shapes_served(args: argparse.Namespace, suite: str) -> tuple[int, int | None, int, int]:
  """The same of a policy behind a server."""
  served.check_flags(args)
  known = served.metadata(args.policy)
  dataset_for([known["dataset"]], suite)
  if known["gripper"] != "command":
    raise refuse(args.policy, f"gripper {known['gripper']!r}", "'command'", "serve it without --gripper=openpi=raw")
  return len(known["views"]), known["proprio_dim"], known["action_dim"], known["chunk"]


def _check_states(suite: str, numbers: Sequence[int]) -> None:
  """Raises ValueError unless the benchmark has initial states for all episodes."""
  for task in sorted({seed // suites.EPISODES for seed in numbers}):
    found = suites.first_states(suites.tasks(suite)[task])
    last = max(seed % suites.EPISODES for seed in numbers if seed // suites.EPISODES == task)
    if last >= len(found):
      raise refuse(
        "LIBERO",
        f"trial {last} of task {task} of {suite}",
        f"0 to {len(found) - 1}, its initial states",
        "lower --trials",
      )


def _check_assets(args: argparse.Namespace) -> None:
  """Raises ValueError unless the folder of assets has all objects of all tasks; the original one lacks LIBERO-PRO's."""
  assets = suites.find_assets(args.assets)
  for suite in args.suite:
    for task in (suites.tasks(suite)[i] for i in suites.task_numbers(args.tasks, suite)):
      if missing := suites.missing_assets(task, assets):
        raise refuse(
          f"Task {task.name} of {suite}",
          f"no {', '.join(missing)} in {assets}",
          "models of all its objects",
          "run `make sim`, unset LIBERO_ASSETS and leave --assets out, or leave the task out with --tasks",
        )


def trained_suite(names: Sequence[str]) -> str:
  """The one of LIBERO's suites with perturbed variants that a policy was trained on, by its statistics.

  Raises:
    ValueError: it has statistics of none of them, or of several.
  """
  found = [suite for suite in dict.fromkeys(suites.PRO.values()) if fitting(names, suite)]
  if len(found) != 1:
    raise refuse(
      "--suite=libero_pro",
      f"a policy with statistics {[*names]}, of {', '.join(found) or 'none of LIBERO'}",
      f"one of {', '.join(dict.fromkeys(suites.PRO.values()))}",
      f"name the suites, e.g. --suite={variants((found or [*suites.SUITES])[0])}",
    )
  return found[0]


def variants(suite: str) -> str:
  """The suites of LIBERO-PRO that perturb one of LIBERO's, with commas."""
  return ",".join(name for name, parent in suites.PRO.items() if parent == suite)


def check_found(args: argparse.Namespace, out: pathlib.Path) -> None:
  """Raises ValueError if episodes of one of the suites were measured differently, as far as flags and files tell.

  The whole fingerprint, including the renderer, is compared when a suite's simulator has started.
  """
  for suite in args.suite:
    try:
      before = json.loads((out / f"{suite}_fingerprint.json").read_text(encoding="utf-8"))
      hashed = before["policy"]["policy_hash"]
    except (OSError, ValueError, KeyError, TypeError):  # none, or a damaged one, which is reported when it is needed
      continue
    wanted = settings(args, suite)
    now = {
      "max_steps": wanted.max_steps or suites.max_steps(suite),
      "protocol": args.protocol,
      "quaternion": wanted.quaternion,
      "wait_steps": wanted.wait_steps,
      "policy_hash": _hash(args.policy) if args.policy else hashed,
    }
    noted = {name: before.get(name) for name in now} | {"policy_hash": hashed}
    folder.merged(noted, now, out / f"{suite}_fingerprint.json")


def _hash(policy: str) -> str:
  return served.metadata(policy)["policy_hash"] if served.is_url(policy) else policy_folder.policy_hash(policy)


def _report_skipped(policy: str, names: Sequence[str]) -> None:
  if served.is_url(policy):  # whose other controls are refused
    return
  model = build(config := policy_folder.read_policy_json(policy).config["model"])
  if skipped := [name for name in names if name not in controls.applying(config, model.prunes_by_instruction, names)]:
    logging.warning("Controls skipped, because they change nothing in this policy: %s", ", ".join(skipped))


def statistics_of(policy: str) -> list[str]:
  """Names of the statistics of a policy folder, or of the one that a server uses."""
  if served.is_url(policy):
    return [served.metadata(policy)["dataset"]]
  return [*policy_folder.read_policy_json(policy).statistics]


def dataset_for(names: Sequence[str], suite: str) -> str:
  """The name of the statistics to use, of those that a policy has.

  Raises:
    ValueError: none of them is in the suite's units.
  """
  fits, own = fitting(names, suite), suites.parent(suite)
  if not fits:
    raise refuse(
      f"Policy has no statistics of {suite}",
      f"those of {[*names]}",
      f"{own!r} or '{own}_no_noops', because actions of another suite are in other units",
      "evaluate the suite that it was trained on, or choose with --dataset",
    )
  return fits[0]
