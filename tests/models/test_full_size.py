"""The 7B trees, as shapes: a rename or a changed count shows in review as a diff of manifests/*.txt.

To accept a change: python tests/models/test_full_size.py
"""

import math
from pathlib import Path

import pytest

from configs import aloha, libero
from semanticvla_jax.convert.check.key_coverage import lora_difference, release_counts, shapes_of
from semanticvla_jax.models.lora import LoRA
from semanticvla_jax.models.semanticvla import build

MANIFESTS = Path(__file__).parent / "manifests"
CONFIGS = {
  "libero_full": libero.get_config("full"),
  "libero_lite": libero.get_config("lite"),
  "aloha": aloha.get_config(),
}


def model(name):
  config = CONFIGS[name]
  return LoRA(build(config.model), config.lora.rank, config.lora.alpha)


def manifest(name) -> str:
  shapes = shapes_of(model(name))
  lines = [f"{path} {'x'.join(map(str, shape))}" for path, shape in sorted(shapes.items())]
  return "\n".join([f"total {sum(map(math.prod, shapes.values()))}", *lines]) + "\n"


@pytest.mark.parametrize("name", CONFIGS)
def test_tree_is_frozen(name):
  assert manifest(name) == (MANIFESTS / f"{name}.txt").read_text(), "accept with: python tests/models/test_full_size.py"


def test_trainable_counts_of_the_release():
  """559.0 M + 268.7 M in the release; ours differ by the split qkv and the dead layers, exactly."""
  counts, difference = release_counts(model("libero_full")), lora_difference(64)
  heads = counts["action_head"] + counts["proprio_projector"]
  release = sum(counts.values()) - heads - sum(difference.values())
  assert (release, heads) == (558_991_232, 268_689_415)


if __name__ == "__main__":
  MANIFESTS.mkdir(exist_ok=True)
  for name in CONFIGS:
    (MANIFESTS / f"{name}.txt").write_text(manifest(name))
