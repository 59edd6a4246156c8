"""Films and moments of episodes in simulators, recorded while they run."""

from __future__ import annotations

import io
import logging
import pathlib
import zipfile
import zlib
from collections.abc import Sequence

import numpy as np

from semanticvla_jax import files
from semanticvla_jax.data import images
from semanticvla_jax.evaluate import attention, folder, report, visualize
from semanticvla_jax.evaluate.rollout_pool import EpisodeLog, EpisodeResult
from semanticvla_jax.policy import Policy

_VIEWS = ("observation/image", "observation/wrist_image")
_RATE = 20  # control steps per second


class FilmRecorder:
  """Records what a report shows: films of the first episodes of either outcome, and two moments of one of them.

  Everything is written to disk at once, so that a resumed evaluation also shows earlier episodes. A film that cannot be
  written is missing from the report, with a warning; a damaged file is made again.

  Args:
    out: folder of the report.
    name: beginning of the names of its files.
    count: number of films, half of them failures if there are as many.
    replan_steps: actions between two frames.
  """

  def __init__(self, out: pathlib.Path, name: str, count: int, replan_steps: int):
    self.out, self.name, self.count, self.replan_steps = out, name, count, replan_steps
    self._list, self._moments = out / f"{name}_films.json", out / f"{name}_moments.npz"
    self._works = True
    films = folder.read_json(self._list, self._listed, None, "the films on disk are listed again")
    self.films = self._there() if films is None and any(out.glob(f"{name}_*_*.mp4")) else films or []
    if self._moments.exists() and self._kept() is None:
      aside = folder.set_aside(self._moments)
      logging.warning("%s is damaged: kept as %s; the next episode is recorded instead", self._moments, aside.name)

  def __call__(self, result: EpisodeResult, seen: list[dict]) -> None:
    """Takes an episode that ended, with the observations that the policy had."""
    if result.error is None and seen and self._works:
      self._works = folder.afterwards("Films", lambda: self._take(result, seen), False)

  def _take(self, result: EpisodeResult, seen: list[dict]) -> bool:
    """Makes a film of an episode if it is among those to show; returns True, for `folder.afterwards`."""
    if not self._moments.exists() or (result.success and not any(film["success"] for film in self.films)):
      self._keep_moments(result, [seen[0], seen[len(seen) // 2]])
    rest = self._room(result.success)
    if rest is None:
      return True
    frames = np.stack([np.stack([one[name] for name in _VIEWS]) for one in seen])
    steps = [min(i * self.replan_steps, result.steps) for i in range(len(seen))]
    path = self.out / f"{self.name}_{result.seed}_{'done' if result.success else 'not_done'}.mp4"
    pictures = visualize.film(frames, result.told, result.success, result.instruction, steps)
    folder.write_film(path, pictures, fps=max(1, round(_RATE / self.replan_steps)))
    dropped = [film["path"] for film in self.films if film not in rest]
    self.films = [film for film in rest if film["path"] != path.name] + [self._entry(path, result)]
    files.write_json(self._list, self.films)
    for name in dropped:
      (self.out / name).unlink(missing_ok=True)
    return True

  def _room(self, success: bool) -> list[dict] | None:
    """The films that are kept with one more of this outcome; None if there is no room for it."""
    if len(self.films) < self.count:
      return self.films
    alike = [film for film in self.films if film["success"] == success]
    share = self.count - self.count // 2 if success else self.count // 2
    if len(alike) >= share:
      return None
    last = [film for film in self.films if film["success"] != success][-1]
    return [film for film in self.films if film is not last]

  def shown(self) -> list[report.Film]:
    """The films, successes first."""
    found = [report.Film(**film | {"path": self.out / film["path"]}) for film in self.films]
    return sorted(found, key=lambda film: (not film.success, film.seed))[: self.count]

  @staticmethod
  def _entry(path: pathlib.Path, result: EpisodeResult) -> dict:
    return {
      "path": path.name,
      "told": result.told,
      "success": result.success,
      "steps": result.steps,
      "seed": result.seed,
    }

  def _listed(self, value: list[dict]) -> list[dict]:
    """Films of the list that are on disk; missing ones are reported."""
    found = [{key: one[key] for key in ("path", "told", "success", "steps", "seed")} for one in value]
    there = [one for one in found if _whole(self.out / one["path"])]
    if gone := [one["path"] for one in found if one not in there]:
      logging.warning("%s: skipped missing or damaged films: %s", self._list, ", ".join(gone))
    return there

  def _there(self) -> list[dict]:
    """The films on disk whose episodes are recorded."""
    records = EpisodeLog(self.out / f"{self.name}_policy.jsonl", repair=True).found.values()
    paths = [self.out / f"{self.name}_{one.seed}_{'done' if one.success else 'not_done'}.mp4" for one in records]
    return [self._entry(path, one) for path, one in zip(paths, records) if _whole(path)][: self.count]

  def _kept(self) -> dict[str, np.ndarray] | None:
    """The moments; None if the file is damaged."""
    try:
      with np.load(self._moments) as file:
        kept = {key: file[key] for key in file.files}
      return kept if {"told", "seed", *(key.replace("/", "|") for key in _VIEWS)} <= kept.keys() else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
      return None

  def looked(self, policy: Policy, sentences: Sequence[str]) -> list[report.Scene]:
    """What the policy looked at in the recorded moments, under its instruction and another one of `sentences`."""
    kept = self._kept() if self._moments.exists() else None
    if kept is None:
      return []
    told, seed = str(kept.pop("told")), int(kept.pop("seed"))
    other = next((sentence for sentence in sentences if sentence != told), told)
    scenes = []
    for i, moment in enumerate(("first frame", "half way")):
      one = {key.replace("|", "/"): value[i] for key, value in kept.items()}
      pair = [{**one, "prompt": sentence} for sentence in (told, other)]
      views = [_large(view) for view in policy.observe(pair[:1]).images[0]]
      name, path = f"episode {seed}, {moment}", attention.path(self.out, self.name, moment)
      scenes.append(attention.scene(name, views, (told, other), visualize.looks(policy, pair), path))
    return scenes

  def _keep_moments(self, result: EpisodeResult, moments: list[dict]) -> None:
    arrays = {key.replace("/", "|"): np.stack([one[key] for one in moments]) for key in (*_VIEWS, "observation/state")}
    buffer = io.BytesIO()
    np.savez(buffer, told=result.told, seed=result.seed, **arrays)
    files.write(self._moments, buffer.getvalue())


def _whole(path: pathlib.Path) -> bool:
  """Whether a film exists and is complete."""
  return path.is_file() and b"moov" in path.read_bytes()


def _large(view: np.ndarray) -> np.ndarray:
  """A view of the model's size, enlarged for the report."""
  return images.resize(view, max(256, view.shape[0]))
