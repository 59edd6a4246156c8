"""FLOPs of the paper's rows: pinned at full size, split by part without a rest, equal for looped encoders."""

import jax
import pytest

from semanticvla_jax.benchmark import flops, programs, rows
from semanticvla_jax.benchmark.record import Result
from semanticvla_jax.train import flops as counter


@pytest.mark.parametrize("row, whole, decoder", [("full", 2_628_207_894_528, 1.72), ("oft", 8_799_981_658_112, 7.99)])
def test_forward_at_full_size(row, whole, decoder):
  found = flops.forward(row, "7b")
  assert sum(found.values()) == whole and round(found["decoder"] / 1e12, 2) == decoder and flops.OTHER not in found


def test_the_paper_counts_as_a_profiler_does():
  paper = rows.ROWS["full"].paper.tflops
  assert abs(flops.profiled("full", "7b") / 1e12 - paper) < 0.01 * paper


@pytest.mark.parametrize("row", ["full", "oft", "table4_sa_id", "openvla"])
def test_parts_add_up_to_the_plain_count_of_the_unlooped_model(row):
  plain = programs.inference(rows.model(row, "tiny"), 32)
  assert sum(flops.forward(row, "tiny").values()) == counter.count(plain.apply, plain.params, plain.observation)
  plain = programs.training(row, rows.model(row, "tiny"), 32)
  arguments = (plain.trainable, plain.frozen, plain.batch, plain.key)
  assert sum(flops.training(row, "tiny").values()) == counter.count(jax.value_and_grad(plain.loss), *arguments)


def test_more_patches_and_longer_prompts_cost_more():
  whole = {row: sum(flops.forward(row, "tiny").values()) for row in ("r4", "full", "lite", "r32")}
  assert whole["r4"] > whole["full"] > whole["lite"] > whole["r32"]
  assert sum(flops.forward("full", "tiny", prompt=40).values()) > whole["full"]


def test_the_verb_prints_and_records_every_part():
  lines = []
  result = Result("flops", {}, lines.append)
  flops.measure(result, ["full", "oft"], "tiny", 32)
  parts = [result.value(f"full forward {name}") for name in flops.PARTS]
  assert sum(parts) == result.value("full forward whole") and min(parts) > 0
  assert result.value("training, oft / full") == (
    result.value("oft training whole") / result.value("full training whole")
  )
  assert any(line.startswith("oft") for line in lines)
