"""The survey of first states: what counts as rest, and a sample of tasks in the real simulator."""

import libero_assets
import pytest

from semanticvla_jax.evaluate.__main__ import main
from semanticvla_jax.libero import suites, survey
from semanticvla_jax.libero.survey import Motion, Rest


@pytest.mark.parametrize(
  "motion, restless",
  [
    (Motion(-0.16, 0.0, 0.0), []),  # falls into place
    (Motion(0.04, 0.001, 0.0), []),  # pushed out of the table top
    (Motion(0.5, 0.01, 0.01), ["ketchup_1"]),
    (Motion(-0.06, 0.037, 0.06), ["ketchup_1"]),
    (Motion(-0.02, 0.0, 1.5), ["ketchup_1"]),
  ],
)
def test_what_counts_as_rest(motion, restless):
  one = Rest("libero_10", 0, {"basket_1": Motion(-0.04, 0.0, 0.0), "ketchup_1": motion}, (100.0, 90.0, 80.0))
  assert one.restless == restless and "frame 100  90  80" in str(one)


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--tasks=0"], "--tasks: got 0 without --survey"),
    ([], "no --policy; expected a policy folder, or --survey"),
    (["--survey", "--suite=libero_cooking"], "suite='libero_cooking'"),
  ],
)
def test_flags_that_do_not_fit_end_the_command_in_a_line(flags, message):
  with pytest.raises(SystemExit, match=message) as ended:
    main(["doctor", *flags])
  assert "\n" not in ended.value.code


@pytest.mark.sim
@pytest.mark.parametrize("suite, task", [("libero_object", 0), ("libero_spatial", 5), ("libero_10", 0)])
def test_a_sample_rests_and_is_as_bright_as_the_published_data(suite, task):
  """All 130 by the command; later versions of MuJoCo change the first (3.3.3) and the others (3.4.0) of these."""
  settings = suites.Settings(suite, libero_assets.assets(), size=128)
  (found,) = survey.tasks(settings, [task])
  assert not found.restless, found
  if suite == "libero_object":
    assert found.rgb == pytest.approx((145, 139, 132), abs=6), "another light, or other assets"
