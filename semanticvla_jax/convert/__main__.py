"""python -m semanticvla_jax.convert VERB …: converts, inspects and compares PyTorch checkpoints and policy folders."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import re
import sys
from pathlib import Path
from types import ModuleType

from semanticvla_jax import cli
from semanticvla_jax.convert import fold, to_orbax, to_torch
from semanticvla_jax.convert.check import against_torch, diff, golden, key_coverage
from semanticvla_jax.errors import refuse

MERGED = {"auto": None, "yes": True, "no": False}  # --merged


def verify_golden(args: argparse.Namespace) -> int:
  """python -m semanticvla_jax.convert verify-golden tests/golden/full

  Loads the folder's weights through the conversion rules, runs the model and prints one line per stored tensor: its
  name and max |ours - theirs| / max(1, max |theirs|). Exit status 1 beyond 5e-5. Given full_size_keys.json or
  full_size_keys_oft.json, checks the mapping of the real 7B checkpoint's names and shapes instead.
  """
  path = Path(args.folder)
  if path.suffix == ".json":
    print("\n".join(key_coverage.verify(path)))
    return 0
  rows = golden.verify(path)
  for row in rows:
    print(f"{row.error:9.2e}  {'ok  ' if row.ok else 'FAIL'}  {row.name}")
  failed = [row for row in rows if not row.ok]
  print(f"{len(rows)} tensors, {len(failed)} beyond {golden.TOLERANCE:g}; largest {max(row.error for row in rows):.2e}")
  return 1 if failed else 0


def to_orbax_verb(args: argparse.Namespace) -> int:
  """python -m semanticvla_jax.convert to-orbax --source openvla-7b --target policy --config configs/openvla.py

  Converts a PyTorch checkpoint into a policy folder, one parameter in memory at a time. A fine-tune that keeps its base
  apart is given as two sources, the base first. Nothing is written unless every tensor is mapped or known to be unused.
  The folder appears under its name when complete; a run that was killed is started again from the beginning.
  """
  report = to_orbax.to_orbax(
    args.source,
    args.target,
    load_config(args.config, args.set),
    to_orbax.Options(
      dtype=args.dtype,
      lora=args.lora,
      tokenizers=args.tokenizers,
      need_statistics=not args.no_statistics,
      merged=MERGED[args.merged],
      only=args.only,
      resample=args.resample,
      pad_vocabulary=args.pad_vocabulary,
    ),
    say=lambda line: print(line, flush=True),
  )
  print("\n".join(to_orbax.table(report)))
  return 0


def to_torch_verb(args: argparse.Namespace) -> int:
  """python -m semanticvla_jax.convert to-torch --policy policy --target checkpoint --base openvla-7b

  Writes a policy in OpenVLA's layout: safetensors shards and index, config.json with norm_stats, companions. Adapters
  are folded in, or written apart with --lora=keep, as config.json records. What the model does not have (last blocks,
  lm_head) comes from --base. With --companions=pt the release's own loaders read the result.
  """
  say = lambda line: print(line, flush=True)  # noqa: E731
  options = to_torch.Options(companions=args.companions, lora=args.lora, check=not args.no_check)
  report = to_torch.to_torch(args.policy, args.target, options, base=args.base, say=say)
  print("\n".join(to_torch.lines(report)))
  return 0


def fold_verb(args: argparse.Namespace) -> int:
  """python -m semanticvla_jax.convert fold --policy policy

  Folds a policy's adapters into its weights, as loading it does, and replaces the folder, or makes another with
  --target. Statistics, tokenizers and reports are kept, and so are the types of the weights; the parameters' hash is
  checked first. A run that is interrupted leaves the old folder whole. Without adapters there is nothing to do.
  """
  fold.fold(args.policy, args.target, say=lambda line: print(line, flush=True))
  return 0


def inspect_verb(args: argparse.Namespace) -> int:
  """python -m semanticvla_jax.convert inspect openvla-7b

  Prints the tensors of a policy folder or PyTorch checkpoint, with counts, statistics and config. No weight is read.
  """
  print("\n".join(diff.inspect(args.path[0] if len(args.path) == 1 else args.path)))
  return 0


def diff_verb(args: argparse.Namespace) -> int:
  """python -m semanticvla_jax.convert diff policy openvla-7b

  Compares two checkpoints of either format, tensor by tensor: max |a - b|, and that over max |a|. Exit status 1 where
  they differ. A side of several paths is given by name: --a openvla-7b tuned --b policy.
  """
  rows = diff.diff(*_sides(args))
  print("\n".join(diff.lines(rows)))
  return 1 if any(row.maximum > 0 or row.note for row in rows) else 0


def _sides(args: argparse.Namespace) -> tuple[str | list[str], str | list[str]]:
  """The two checkpoints of `diff`, given by place or by name."""
  sides = [*args.path, *(named for named in (args.a, args.b) if named)]
  if len(sides) != 2 or (args.path and args.b is None and args.a is not None):
    raise refuse(
      "diff",
      f"{len(args.path)} paths, --a {args.a or 'none'} and --b {args.b or 'none'}",
      "two checkpoints",
      "pass A B, or A --b PATH…, or --a PATH… --b PATH…",
    )
  return tuple(side[0] if isinstance(side, list) and len(side) == 1 else side for side in sides)


def verify_verb(args: argparse.Namespace) -> int:
  """python -m semanticvla_jax.convert verify --source openvla-7b --policy policy

  Runs PyTorch's classes on a checkpoint's weights and ours on the policy made from it, on the same random input, and
  prints max |ours - theirs| / max(1, max |theirs|) of every stage. Exit status 1 above the tolerance. Needs torch and
  transformers (requirements-parity.txt); one encoder or one layer is in memory at a time.
  """

  def say(row: against_torch.Row) -> None:
    print(f"{row.error:9.2e}  {'ok  ' if row.error <= args.tolerance else 'FAIL'}  {row.stage}", flush=True)

  rows, left = against_torch.verify(args.source, args.policy, seed=args.seed, merged=MERGED[args.merged], say=say)
  failed = [row for row in rows if not row.error <= args.tolerance]
  print(f"{len(rows)} stages, {len(failed)} beyond {args.tolerance:g}; not run: {', '.join(left) or 'none'}")
  return 1 if failed else 0


def load_config(name: str, changes: list[str]) -> dict:
  """A config file, "configs/openvla_oft.py:film", with FIELD=VALUE changes, as plain JSON values."""
  path, _, arg = name.partition(":")
  config = _config_module(Path(path)).get_config(arg or None)
  for change in changes:
    key, equals, value = change.partition("=")
    if not equals:
      raise refuse(f"--config.{change}", "no value", "--config.FIELD=VALUE, e.g. --config.lora.rank=32", "add =VALUE")
    try:
      config.update_from_flattened_dict({key: _value(value)})
    except (KeyError, TypeError) as error:
      raise refuse(f"--config.{change}", f"{error}", f"a field of {path}", "check its name and type") from error
  return json.loads(config.to_json_best_effort())


def _config_module(file: Path) -> ModuleType:
  if not file.is_file() or file.suffix != ".py":
    raise refuse("No config", f"{file}", "a file such as configs/openvla_oft.py", "check the path")
  cli.make_importable(str(file))
  spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except (SyntaxError, ImportError, NameError, AttributeError, TypeError) as error:
    raise refuse(
      f"{file} cannot be run",
      f"{type(error).__name__}: {error}",
      "a Python file with get_config",
      "correct it",
    ) from error
  if not hasattr(module, "get_config"):
    raise refuse(f"{file} is not a config", "no get_config", "that function, as in configs/", "pass another file")
  return module


def _value(text: str):
  try:
    return json.loads(text)
  except ValueError:
    return text


def _golden_arguments(verb: argparse.ArgumentParser) -> None:
  verb.add_argument("folder", help="a golden folder, or a *_keys*.json file")


def _to_orbax_arguments(verb: argparse.ArgumentParser) -> None:
  verb.add_argument("--source", nargs="+", required=True, metavar="PATH", help="folders or files, a base first")
  verb.add_argument("--target", required=True, metavar="DIR", help="policy folder to make; must not exist")
  verb.add_argument("--config", required=True, metavar="FILE[:ARG]", help="such as configs/openvla_oft.py:film")
  verb.add_argument(
    "--config.FIELD",
    dest="set",
    action="append",
    default=[],
    metavar="VALUE",
    help="change a field of the config, as in train: --config.lora.rank=32 (or, as before, --set lora.rank=32)",
  )
  verb.add_argument("--set", dest="set", nargs="+", action="extend", help=argparse.SUPPRESS)
  verb.add_argument(
    "--dtype", choices=tuple(to_orbax.DTYPES), default="keep", help="type of every parameter (default: as stored)"
  )
  verb.add_argument("--lora", choices=("keep", "merge"), default="keep", help="keep adapters (default) or fold them in")
  _merged_argument(verb)
  verb.add_argument("--tokenizers", metavar="DIR", help="folder of tokenizers (default: the source's)")
  verb.add_argument("--only", choices=("siglip", "text"), help="convert one tower of a source that has both")
  verb.add_argument("--resample", action="store_true", help="resample position embeddings of another image size")
  verb.add_argument("--pad-vocabulary", action="store_true", help="append rows of zeros to a smaller vocabulary")
  verb.add_argument("--no-statistics", action="store_true", help="convert a model that has no action statistics")


def _merged_argument(verb: argparse.ArgumentParser) -> None:
  help_text = "whether lora_adapter/ is folded into the shards already (default: %(default)s)"
  verb.add_argument("--merged", choices=tuple(MERGED), default="auto", help=help_text)


def _to_torch_arguments(verb: argparse.ArgumentParser) -> None:
  verb.add_argument("--policy", required=True, metavar="DIR", help="a policy folder")
  verb.add_argument("--target", required=True, metavar="DIR", help="the folder to make; must not exist")
  verb.add_argument(
    "--base", nargs="+", default=[], metavar="PATH", help="the checkpoint it came from, for what ours lacks"
  )
  verb.add_argument(
    "--companions",
    choices=("safetensors", "pt"),
    default="safetensors",
    help="format of action_head--N_checkpoint and the like; pt: as the release's loaders read them (needs torch)",
  )
  verb.add_argument(
    "--lora",
    choices=("merge", "keep"),
    default="merge",
    help="fold adapters in, or write them as peft's lora_adapter/ next to the weights they were trained on",
  )
  verb.add_argument("--no-check", action="store_true", help="skip comparing the parameters' hash with metadata.json")


def _fold_arguments(verb: argparse.ArgumentParser) -> None:
  verb.add_argument("--policy", required=True, metavar="DIR", help="a policy folder with adapters")
  verb.add_argument("--target", metavar="DIR", help="the folder to make; must not exist (default: in place)")


def _inspect_arguments(verb: argparse.ArgumentParser) -> None:
  verb.add_argument("path", nargs="+", help="a policy folder, or folders and files of a PyTorch checkpoint")


def _diff_arguments(verb: argparse.ArgumentParser) -> None:
  verb.add_argument("path", nargs="*", help="two of: a policy folder, or a folder or file of PyTorch weights")
  verb.add_argument("--a", nargs="+", metavar="PATH", help="the first checkpoint, of several paths, a base first")
  verb.add_argument("--b", nargs="+", metavar="PATH", help="the second, likewise")


def _verify_arguments(verb: argparse.ArgumentParser) -> None:
  verb.add_argument("--source", nargs="+", required=True, metavar="PATH", help="folders or files, as in to-orbax")
  verb.add_argument("--policy", required=True, metavar="DIR", help="the policy folder made from them")
  verb.add_argument("--seed", type=int, default=0, help="seed of the inputs (default: %(default)s)")
  tolerance = dict(default=against_torch.TOLERANCE, help="largest accepted error (default: %(default)s)")
  verb.add_argument("--tolerance", type=float, **tolerance)
  _merged_argument(verb)


VERBS = {
  "diff": (diff_verb, _diff_arguments),
  "fold": (fold_verb, _fold_arguments),
  "inspect": (inspect_verb, _inspect_arguments),
  "to-orbax": (to_orbax_verb, _to_orbax_arguments),
  "to-torch": (to_torch_verb, _to_torch_arguments),
  "verify": (verify_verb, _verify_arguments),
  "verify-golden": (verify_golden, _golden_arguments),
}


def _field_by_field(argv: list[str]) -> list[str]:
  """The words with `--config.lora.rank=32` as `--config.FIELD=lora.rank=32`, which argparse knows."""
  return [re.sub(r"^--config\.(?!FIELD=)", "--config.FIELD=", word) for word in argv]


def main(argv: list[str] | None = None) -> int:
  description = "Converts, inspects and compares PyTorch checkpoints and policy folders."
  parser = cli.ArgumentParser("python -m semanticvla_jax.convert", description)
  verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
  for name, (function, arguments) in VERBS.items():
    first, rest = function.__doc__.split("\n\n", 1)
    verb = verbs.add_parser(
      name,
      help=" ".join(rest.split(". ")[0].split()),
      description=f"Example: {first}\n\n{inspect.cleandoc(rest)}",
    )
    arguments(verb)
    verb.set_defaults(run=function)
  args = parser.parse_args(_field_by_field([*sys.argv[1:]] if argv is None else argv))
  try:
    return args.run(args)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
  cli.run(main)
