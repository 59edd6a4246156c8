"""Results folders that version fb273c7 wrote, of the tabletop and of LIBERO: they have to stay readable.

That version ran four episodes of a tiny policy and their shuffled control; episode 3 of the tabletop and 50 of LIBERO
failed by a non-finite action. Runners and simulators were those of test_tabletop_command.py and test_libero_folder.py.
"""

import json
import shutil
from pathlib import Path

from semanticvla_jax.evaluate import fingerprint
from semanticvla_jax.libero import suites

FOLDER = Path(__file__).parent / "evaluate" / "earlier"


def rows(name: str) -> list[dict]:
  """The rows of a folder's results.json, as they were written."""
  return json.loads((FOLDER / name / "results.json").read_text(encoding="utf-8"))["results"]


def copy(name: str, target: Path, policy_hash: str) -> Path:
  """A copy of the folder "tabletop" or "libero", as if that version had run here: on this device, with these packages.

  Args:
    name: of the folder.
    target: does not exist yet.
    policy_hash: of the policy that the copy is resumed with.
  """
  shutil.copytree(FOLDER / name, target)
  for path in target.glob("*.json"):
    value = json.loads(path.read_text(encoding="utf-8"))
    for mark in [row["fingerprint"] for row in value["results"]] if "results" in value else [value]:
      mark |= {"device": fingerprint.device(), "versions": fingerprint.versions()}
      mark["policy"]["policy_hash"] = policy_hash
      if "simulator" in mark:
        mark["simulator"] = suites.versions()
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
  return target
