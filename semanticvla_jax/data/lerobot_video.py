"""Frames of an mp4 by their time, read with PyAV: forward, each found exactly or refused."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from semanticvla_jax import cli
from semanticvla_jax.errors import refuse


class Film:
  """Reads one video after the other; calls for the same one go on where the last ended."""

  def __init__(self):
    self._path, self._container, self._coming = None, None, iter(())
    self._reached = -np.inf  # seconds of the last frame given

  def frames(
    self, path: pathlib.Path, seconds: Float[np.ndarray, " t"], tolerance: float, name: str
  ) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Yields the frames at these times, RGB.

    Args:
      path: of the video.
      seconds: ascending, in the video's time.
      tolerance: how far a frame's time may be from what is asked for, seconds.
      name: of what is read, for messages.

    Raises:
      ValueError: the file is missing, damaged or ends too early, or a frame is not where it should be.
    """
    if path != self._path or seconds[0] <= self._reached:
      self._open(path, float(seconds[0]), tolerance)
    before = None
    for number, wanted in enumerate(seconds.tolist()):
      for at, frame in self._coming:  # noqa: B007
        if at >= wanted - tolerance:
          break
        before = at
        if number:  # between two frames of an episode nothing is left out
          raise _other(path, name, number, wanted, at)
      else:
        raise _ended(path, name, number, wanted, before)
      if at > wanted + tolerance:
        raise _other(path, name, number, wanted, at)
      self._reached = before = at
      yield frame.to_ndarray(format="rgb24")

  def close(self) -> None:
    """Closes the file that is open."""
    if self._container is not None:
      self._container.close()
    self._path = self._container = None

  def _open(self, path: pathlib.Path, first: float, tolerance: float) -> None:
    import av

    self.close()
    try:
      self._container = av.open(str(path))
      stream = self._container.streams.video[0]
      stream.thread_type = "AUTO"
      if first > tolerance:
        self._container.seek(int((first - tolerance) / stream.time_base), stream=stream)
    except (OSError, IndexError, av.error.FFmpegError) as error:
      raise _damaged(path, error) from error
    self._path, self._reached = path, -np.inf
    self._coming = _decoded(path, self._container)


def _decoded(path: pathlib.Path, container: Any) -> Iterator[tuple[float, Any]]:
  import av

  try:
    for frame in container.decode(video=0):
      yield float(frame.pts * frame.time_base), frame
  except (av.error.FFmpegError, TypeError) as error:  # TypeError: a frame without a time
    raise _damaged(path, error) from error


def _damaged(path: pathlib.Path, error: Exception) -> ValueError:
  what = "no such file" if isinstance(error, FileNotFoundError) else cli.first_line(error)
  return refuse(f"Video {path}", what, "a whole video", "download the dataset again")


def _ended(path: pathlib.Path, name: str, number: int, wanted: float, last: float | None) -> ValueError:
  end = "no frame" if last is None else f"its last frame at {last:.4f} s"
  return refuse(f"Video {path}", end, f"one at {wanted:.4f} s (frame {number}, {name})", "download the dataset again")


def _other(path: pathlib.Path, name: str, number: int, wanted: float, at: float) -> ValueError:
  return refuse(
    f"Video {path}",
    f"a frame at {at:.4f} s",
    f"one at {wanted:.4f} s (frame {number}, {name})",
    "encode the video again with the times of the parquet file",
  )
