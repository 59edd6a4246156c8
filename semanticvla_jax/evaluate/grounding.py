"""How much of what the pruner keeps lies on the objects that the instruction names, against chance.

At every policy query, for every view, with the ID-Pruner's kept patches (anchors) and a mask of the pixels that show an
object which the episode's own task names. A crop that the policy sees instead of the frame is taken into account. A
patch is filled by the share of its area that shows named objects. Then, over all queries in whose view one of these
objects is seen:

  on_objects     the mean filling of the kept patches: the share of their area that shows named objects;
  chance         the mean filling of all patches: the share of the picture's area that shows named objects, which is
                 what as many patches, drawn at random, have on average;
  objects_kept   the share of the named objects' visible area that is inside kept patches;
  kept           the share of all patches that is kept: what `objects_kept` is of as many patches drawn at random.

`on_objects / chance` equals `objects_kept / kept` at each query. Objects are smaller than what is kept, so `on_objects`
stays far below one even where all of them is kept; `objects_kept` says how near that is. The objects are always those
of the episode's own task: under another episode's instruction a pruner that follows the words keeps other patches, and
both figures fall. Each is the mean over an episode's queries, and then over episodes, with a 95 % interval of that mean
(Student's t over episodes, cut at 0 and 1). Episodes in which no named object is seen in a view are not in its mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float

FIGURES = ("on_objects", "chance", "objects_kept", "kept")


def filling(masks: Bool[np.ndarray, "*b s s"], side: int, crop_area: float | None = None) -> Float[np.ndarray, "*b n"]:
  """The share of each patch's area that a mask covers, n = side² patches in raster order, in [0, 1].

  A pixel belongs to the patch that holds its center.

  Args:
    masks: of whole frames.
    side: patches along a side of what the policy sees.
    crop_area: share of the frame's area, a square in its middle, that the policy sees; None for all of it.
  """
  *b, s, _ = masks.shape
  reach = math.sqrt(1.0 if crop_area is None else crop_area)
  place = ((np.arange(s) + 0.5) / s - (1 - reach) / 2) / reach * side
  line = np.where((place >= 0) & (place < side), np.floor(place), side).astype(np.int64)  # `side`: outside the crop
  member = (line[:, None] == np.arange(side)).astype(np.float32)
  counts = np.einsum("yp,...yx,xq->...pq", member, masks.astype(np.float32), member)
  return (counts / np.outer(member.sum(0), member.sum(0))).reshape(*b, side * side)


def of_episode(
  kept: Bool[np.ndarray, "t v n"], filled: Float[np.ndarray, "t v n"], views: Sequence[str]
) -> dict[str, dict]:
  """The figures of one episode by view, means over the queries in which named objects are seen, and their number.

  Args:
    kept: the patches kept at each query.
    filled: of `filling`.
    views: names of the views.
  """
  found = {}
  for i, name in enumerate(views):
    seen = filled[:, i].sum(axis=1) > 0
    k, f = kept[seen, i].astype(np.float64), filled[seen, i].astype(np.float64)
    found[name] = {"queries": int(seen.sum())}
    if seen.any():
      on = (k * f).sum(axis=1)
      figures = (on / k.sum(axis=1), f.mean(axis=1), on / f.sum(axis=1), k.mean(axis=1))
      found[name] |= {figure: round(float(values.mean()), 6) for figure, values in zip(FIGURES, figures)}
  return found


def summary(episodes: Sequence[Mapping | None]) -> dict[str, dict]:
  """The figures by view over episodes, as JSON values: means, and intervals of `on_objects` and `objects_kept`.

  A view in which named objects are never seen has counts of 0 alone.
  """
  known = [one for one in episodes if one is not None]
  found = {}
  for view in known[0] if known else ():
    some = [one[view] for one in known if one[view]["queries"]]
    found[view] = {"episodes": len(some), "queries": sum(one["queries"] for one in some)}
    if some:
      found[view] |= {figure: float(np.mean([one[figure] for one in some])) for figure in FIGURES}
      for figure in ("on_objects", "objects_kept"):
        found[view][f"{figure}_interval"] = [*interval([one[figure] for one in some])]
  return found


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
  """The interval of the mean of shares (Student's t), within [0, 1]; (0, 1) of a single one."""
  n = len(values)
  if n < 2:
    return 0.0, 1.0
  from scipy import stats  # takes seconds to import, and --help need not wait for it

  mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(n)
  width = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * error
  return max(0.0, mean - width), min(1.0, mean + width)
