"""What a config leaves to a DatasetSpec is filled in from it; what does not agree is refused before data is read."""

import numpy as np
import pytest

from configs import common, robot
from semanticvla_jax.data import datasets
from semanticvla_jax.train import from_specs, init, inputs, resume

HAND = """
from semanticvla_jax.data.spec import DatasetSpec, Gripper

HAND = DatasetSpec(
  name="hand", columns={"action": 10, "observation/state": 5}, views=("front", "left", "right", "wrist"),
  absolute=(True,) * 10, groups={"wrist": (0, 1, 2), "base": (4, 3), "fingers": (5, 6, 7, 8, 9)},
  optional=("left", "wrist"), chunk=6, mode="bounds",
)
OTHER = HAND._replace(name="other")
LONGER = HAND._replace(name="longer", chunk=7)
NAMELESS = HAND._replace(name=None)
BLIND = HAND._replace(name="blind", proprio=(), proprio_dim=0)
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
  path = tmp_path_factory.mktemp("specs") / "hand.py"
  path.write_text(HAND, encoding="utf-8")
  return path


def config(file, *names, **changes):
  made = robot.get_config("@tiny")
  made.data.specs = tuple(f"{file}:{name}" for name in names)
  made.update_from_flattened_dict(changes)
  return made


def test_everything_left_open_is_the_specs(file):
  found = from_specs.resolve(config(file, "HAND"))
  model = found.model
  assert (model.num_views, model.proprio_dim, model.action_dim, model.chunk) == (4, 5, 10, 6)
  assert model.groups == (("wrist", (0, 1, 2)), ("base", (4, 3)), ("fingers", (5, 6, 7, 8, 9)))
  assert model.optional_views == (1, 3) and (found.data.mixture, found.data.normalisation) == ("hand", "bounds")
  _, bare = init.make_model(found)
  assert bare.coupler.tokens == 3 and bare.coupler.groups == model.groups and bare.optional_views == (1, 3)
  assert from_specs.resolve(found).to_dict() == found.to_dict(), "what is resolved stays as it is"
  assert resume.plain(found)["model"]["groups"] == [
    ["wrist", [0, 1, 2]],
    ["base", [4, 3]],
    ["fingers", [5, 6, 7, 8, 9]],
  ]


def test_what_the_config_sets_stays(file):
  changes = {"model.chunk": 12, "data.normalisation": "bounds_q99", "data.mixture": "mine", "model.coupler": "single"}
  found = from_specs.resolve(config(file, "NAMELESS", **changes))
  assert (found.model.chunk, found.data.normalisation, found.data.mixture) == (12, "bounds_q99", "mine")
  assert found.model.groups is None, "a single head has no groups"


def test_several_specs_of_one_robot_are_a_mixture(file):
  assert from_specs.resolve(config(file, "HAND", "OTHER")).data.mixture == "hand,other"
  with pytest.raises(
    ValueError, match=r"config.data.specs: got chunk \[6, 7\] in \['hand', 'longer'\]; expected the same"
  ):
    from_specs.resolve(config(file, "HAND", "LONGER"))
  with pytest.raises(ValueError, match="config.data.mixture: got None with 1 DatasetSpecs without a name"):
    from_specs.resolve(config(file, "NAMELESS"))


def test_a_robot_without_proprioception_gives_a_model_without_it(file):
  assert from_specs.resolve(config(file, "BLIND")).model.proprio_dim is None


def test_a_config_with_open_fields_needs_a_spec():
  with pytest.raises(
    ValueError, match="config.data.specs: got no DatasetSpec; expected one that decides model.action_dim"
  ):
    from_specs.resolve(robot.get_config("@tiny"))


def test_a_config_without_specs_is_left_alone():
  made = common.get_config("tiny")
  assert from_specs.resolve(made) is made


def check(file, name, changes=None, **of_spec):
  found = from_specs.resolve(config(file, "HAND"))
  found.update_from_flattened_dict(changes or {})
  _, bare = init.make_model(found)
  inputs.check_robot(found, bare, name, from_specs.own_specs(found)[0]._replace(**of_spec))


def test_a_spec_and_a_model_that_disagree_are_refused(file):
  check(file, "hand")
  with pytest.raises(ValueError, match="Dataset 'hand', groups: got .*'hand': .*leave config.model.groups at None"):
    check(file, "hand", groups={"hand": (*range(10),)})
  with pytest.raises(ValueError, match=r"\(views, proprio_dim, action_dim\) \(4, 5, 10\); expected \(4, 6, 10\)"):
    check(file, "hand", {"model.proprio_dim": 6})
  with pytest.raises(ValueError, match=r"config.data.jitter: got .* with 10 action and 5 proprioception dimensions"):
    check(file, "hand", {"data.jitter": (0.01, 0.0)})
  with pytest.raises(ValueError, match=r"optional views: got \['left'\], which the model takes for always there"):
    check(file, "hand", {"model.optional_views": (3,)})


def test_the_shipped_robots_agree_with_the_groups_of_their_models():
  made = common.get_config("tiny")
  _, bare = init.make_model(made)
  for name in ("libero_goal_no_noops", "tabletop_pick"):
    inputs.check_robot(made, bare, name, datasets.spec(name))
  assert dict(bare.coupler.groups) == datasets.LIBERO.groups


def test_a_head_of_another_robot_is_drawn_anew(caplog):
  shape = lambda *dims: np.zeros(dims, np.float32)  # noqa: E731
  base = {
    "llm": {"norm": shape(4)},
    "coupler": {"grip": {"out": shape(4, 1)}},
    "proprio_projector": {"fc": shape(8, 4)},
  }
  wanted = base | {"proprio_projector": {"fc": shape(7, 4)}}
  with pytest.raises(ValueError, match="1 of another shape"):
    init.match_base(wanted, base, "base")
  with caplog.at_level("INFO"):
    taken = init.match_base(wanted, base, "base", own_robot=True)
  assert taken == ["coupler/grip/out", "llm/norm"] and "of another width" in caplog.text
