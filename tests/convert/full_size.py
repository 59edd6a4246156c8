"""A checkpoint of random weights in the layout of openvla-7b: real names, shapes and type, 15 GB or less.

python tests/convert/full_size.py FOLDER --layers 32
"""

from __future__ import annotations

import argparse
import json
import math
import re
import struct
from pathlib import Path

import ml_dtypes
import numpy as np

GOLDEN = Path(__file__).parent.parent / "golden"
SHARD = 7 * 10**9  # bytes, as openvla-7b was saved
_BLOCK = 1 << 25  # random numbers, of which every tensor takes a different run


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
  """{key: shape} of openvla-7b with the first `layers` of its language model's 32."""
  keys = json.loads((GOLDEN / "full_size_keys_oft.json").read_text())["base"]
  number = re.compile(r"language_model\.model\.layers\.(\d+)\.")
  return {key: tuple(s) for key, s in keys.items() if not (m := number.match(key)) or int(m[1]) < layers}


def write(folder: Path, layers: int = 32, seed: int = 0, shard: int = SHARD) -> int:
  """Writes shards, index and config.json into a new folder; returns the bytes of the weights. 0.1 GB of memory."""
  folder.mkdir(parents=True)
  block = (np.random.default_rng(seed).standard_normal(_BLOCK, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
  parts: list[dict[str, tuple[int, ...]]] = [{}]
  room = shard
  for key, shape in shapes(layers).items():
    nbytes = 2 * math.prod(shape)
    if parts[-1] and nbytes > room:
      parts, room = [*parts, {}], shard
    parts[-1][key] = shape
    room -= nbytes
  names = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
  total = sum(_write_shard(folder / name, part, block.view(np.uint8)) for name, part in zip(names, parts))
  weight_map = {key: name for name, part in zip(names, parts) for key in part}
  index = {"metadata": {"total_size": total}, "weight_map": weight_map}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  stats = json.loads((GOLDEN / "openvla" / "config.json").read_text())["norm_stats"]
  (folder / "config.json").write_text(json.dumps({"model_type": "openvla", "norm_stats": stats}))
  return total


def _write_shard(path: Path, part: dict[str, tuple[int, ...]], block: np.ndarray) -> int:
  header, at = {"__metadata__": {"format": "pt"}}, 0
  for key, shape in part.items():
    end = at + 2 * math.prod(shape)
    header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
    at = end
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  with path.open("wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    for i, shape in enumerate(part.values()):
      left, start = 2 * math.prod(shape), 2 * (i * 7919 % (_BLOCK // 2))
      while left:
        run = block[start : start + left]
        file.write(run)
        left, start = left - len(run), 0
  return at


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("folder", type=Path)
  parser.add_argument("--layers", type=int, default=32)
  args = parser.parse_args()
  print(f"{write(args.folder, args.layers):,} bytes")
