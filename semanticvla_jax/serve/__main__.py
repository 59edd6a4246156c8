"""Serves a policy to robots and harnesses over the protocols that their clients speak.

    python -m semanticvla_jax.serve --policy=checkpoints/tabletop_small
    python -m semanticvla_jax.serve --policy=DIR --host=0.0.0.0 --api-key-file=KEY --tls-cert=CERT --tls-key=KEY

Compiles every batch size and prompt length and runs each once before it listens. Without a subcommand, flags are those
of `run`. docs/serving.md has the protocols and their clients.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import time
from collections.abc import Sequence
from typing import Any

from semanticvla_jax import cli
from semanticvla_jax.errors import refuse

_PROGRAM = "python -m semanticvla_jax.serve"
_COMMANDS = {
  "run": "load a policy, warm it up, and serve it",
  "replay": "run recorded requests again and compare the answers bit for bit",
}
_NEEDS = ("starlette", "uvicorn", "websockets", "msgpack", "prometheus_client")


def check_installed(needs: Sequence[str], remedy: str = "pip install -r requirements-serve.txt") -> None:
  """Raises ValueError where a library of the server is missing."""
  if missing := [name for name in needs if importlib.util.find_spec(name) is None]:
    raise refuse("serve", f"no {', '.join(missing)}", "the server's libraries", remedy)


def _counts(words: str) -> list[int]:
  found = [int(word) if word.strip().isdecimal() else 0 for word in words.split(",")]
  if min(found) < 1:
    raise argparse.ArgumentTypeError(f"got {words!r}; expected whole numbers from 1, such as 1,2,4")
  return sorted(set(found))


def _positive(word: str) -> float:
  try:
    found = float(word)
  except ValueError:
    found = -1.0
  if not 0 <= found < 1e9:
    raise argparse.ArgumentTypeError(f"got {word!r}; expected a number from 0")
  return found


def arguments(argv: Sequence[str]) -> argparse.Namespace:
  """The flags of `run`."""
  parser = cli.ArgumentParser(f"{_PROGRAM} run", __doc__)
  add = parser.add_argument
  add("--policy", required=True, help="policy folder, or a file that Policy.export wrote")
  add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)")
  add("--port", type=int, default=8000, help="port (default: 8000, openpi's)")
  add("--api-key-file", metavar="FILE", help="text file with the key that every request must carry (default: no key)")
  add("--tls-cert", metavar="FILE", help="certificate of TLS (default: plain HTTP)")
  add("--tls-key", metavar="FILE", help="private key of the certificate")
  add("--dataset", help="whose statistics to use, if the policy has several (default: the only one)")
  add("--dtype", help="dtype of parameters and computation, e.g. bfloat16 (default: as trained)")
  add("--weights", choices=("full", "int8", "fp8"), default="full", help="of the decoder (default: full)")
  add("--attention", choices=("xla", "triton"), default="xla", help="triton: one kernel, on a GPU (default: xla)")
  add("--batch-sizes", type=_counts, default=[1, 2, 4, 8], help="sizes to compile, with commas (default: 1,2,4,8)")
  add(
    "--prompt-lengths", type=_counts, default=[], help="further prompt lengths to compile (default: the longest only)"
  )
  add("--max-batch", type=int, help="observations of a device call, at most (default: the largest batch size)")
  add("--max-wait-ms", type=_positive, default=5.0, help="wait for other active clients, at most (default: 5)")
  add("--deadline-ms", type=_positive, default=10000.0, help="time in the queue, at most (default: 10000)")
  add("--max-requests", type=int, default=128, help="requests under way, at most; more are refused (default: 128)")
  add("--max-clients", type=int, default=256, help="open connections, at most (default: 256)")
  add("--max-bytes", type=int, default=32 << 20, help="bytes of a request, at most (default: 33554432)")
  add("--idle-timeout", type=_positive, default=1800.0, help="seconds until a silent client is closed (default: 1800)")
  add("--limit", choices=("off", "clip", "refuse"), default="off", help="for actions outside the training data's range")
  add(
    "--gripper", action="append", default=[], metavar="DOOR=NAME", help="gripper convention of a door; may be repeated"
  )
  add(
    "--lerobot-port",
    type=int,
    help="port for LeRobot's RobotClient (gRPC, plain text); 8080 is its own (default: none)",
  )
  add("--groot-port", type=int, help="port for GR00T's clients (ZMQ, needs pyzmq); 5555 is its own (default: none)")
  add("--fps", type=float, default=30.0, help="of LeRobot's robots, for the time stamps of actions (default: 30)")
  add("--record", metavar="DIR", help="folder to write every request and answer to, for replay (default: none)")
  args = parser.parse_args(argv)
  args.max_batch = max(args.batch_sizes) if args.max_batch is None else args.max_batch
  if (args.tls_cert is None) != (args.tls_key is None):
    raise refuse("TLS", f"--tls-cert={args.tls_cert} and --tls-key={args.tls_key}", "both or none", "give both")
  return args


def _options(args: argparse.Namespace) -> dict[str, Any]:
  """How the policy is read, besides its batch sizes."""
  names = ("dataset", "dtype", "weights", "attention", "prompt_lengths")
  return {name: getattr(args, name) for name in names}


def make_site(args: argparse.Namespace, policy: Any) -> Any:
  """A started core behind its doors, for a loaded policy."""
  from semanticvla_jax.serve import contract, core, limits, metrics, record, site

  settings = core.Settings(args.max_batch, 1e-3 * args.max_wait_ms, 1e-3 * args.deadline_ms, args.max_requests)
  core.check(settings, policy.metadata["batch_sizes"])
  counted, recorder = metrics.Metrics(), None
  if args.record is not None:
    recorder = record.Recorder(args.record, record.facts(policy, args.limit, contract.device(), _options(args)))
  one = core.Core(policy, settings, limits.ActionLimit(policy.stats.action, args.limit), counted, recorder)
  counted.attach(one)
  own = dict(max_bytes=args.max_bytes, idle_timeout=args.idle_timeout)
  found = site.Site(one, counted, contract.grippers(args.gripper), **own)
  one.start()
  return found


def describe(metadata: dict[str, Any], url: str, p50: float) -> str:
  """What is served, in a few lines."""
  chunk, width = metadata["answer"]["shape"]
  state = "no state" if metadata["proprio_dim"] is None else f"a state of {metadata['proprio_dim']}"
  grippers = ", ".join(f"{door} {one['convention']}" for door, one in metadata["grippers"].items())
  lines = {
    "policy": f"{metadata.get('policy_hash')}, dataset {metadata.get('dataset')}, {metadata['dtype']}",
    "reads": f"{', '.join(metadata['views'])}; {state}; an instruction",
    "answers": f"{chunk} actions of {width}: {metadata['action_units']}",
    "gripper": grippers,
    "limit": metadata["limits"]["actions"]["limit"],
    "device": metadata["device"],
    "compiled": f"batch sizes {metadata['batch_sizes']}, prompt lengths {metadata['prompt_lengths']}",
    "latency": f"{p50:.1f} ms for one observation (median of 6 calls)",
    "listens": url,
  }
  return "\n".join(f"{name:9} {text}" for name, text in lines.items())


def run(argv: Sequence[str]) -> None:
  """Loads, warms, prints what is served, and serves until SIGTERM or ^C."""
  args = arguments(argv)
  check_installed(_NEEDS)

  from semanticvla_jax.serve import gate, server

  key = None if args.api_key_file is None else gate.read_key(args.api_key_file)
  where = server.Address(args.host, args.port, key, args.tls_cert, args.tls_key, args.max_clients)
  server.check(where)
  listener, begin = server.bind(args.host, args.port), time.monotonic()
  policy = server.load(args.policy, sizes=args.batch_sizes, **_options(args))
  p50 = server.latency(policy)
  found = make_site(args, policy)
  url = f"{'http' if args.tls_cert is None else 'https'}://{args.host}:{listener.getsockname()[1]}"
  print(describe(found.metadata, url, p50))
  print(f"ready after {time.monotonic() - begin:.1f} s", flush=True)
  if key is None and args.host not in ("127.0.0.1", "localhost", "::1"):
    logging.warning("No --api-key-file: whoever reaches %s can use the policy.", url)
  try:
    server.Server(found, where, _other_doors(args, found, key)).run([listener])
  finally:
    found.core.close()
    if found.core.record is not None:
      found.core.record.close()


def _other_doors(args: argparse.Namespace, found: Any, key: str | None) -> list[Any]:
  """What opens the doors of other ports."""
  doors: list[Any] = []
  if args.lerobot_port is not None:
    from semanticvla_jax.serve.doors import lerobot

    doors.append(lambda loop: lerobot.Door(found, loop, args.host, args.lerobot_port, fps=args.fps, key=key))
  if args.groot_port is not None:
    check_installed(("zmq",), "pip install pyzmq")
    from semanticvla_jax.serve.doors import groot

    doors.append(lambda loop: groot.Door(found, loop, args.host, args.groot_port, key=key))
  return doors


def replay(argv: Sequence[str]) -> int:
  """Runs a recording again; status 1 where an answer is another."""
  check_installed(_NEEDS)
  from semanticvla_jax.serve import record, server

  parser = cli.ArgumentParser(f"{_PROGRAM} replay", record.__doc__)
  parser.add_argument("folder", help="recording, of run --record=DIR")
  parser.add_argument("--policy", required=True, help="the policy folder, or the exported file, that was recorded")
  args = parser.parse_args(argv)
  found = record.recordings(args.folder)
  known = found[0][1]
  policy = server.load(args.policy, sizes=known["batch_sizes"], **known["options"])
  result = record.replay(policy, found)
  print("\n".join([*result.different, f"{result.calls} calls of the device, {result.observations} observations:"]))
  print("all equal, bit for bit" if not result.unequal else f"{result.unequal} differ, by up to {result.largest:.3g}")
  return 1 if result.unequal else 0


def main(argv: list[str]) -> int | None:
  """Runs a subcommand."""
  logging.basicConfig(level=logging.WARNING, format="%(message)s")
  name, rest = cli.subcommand(_PROGRAM, __doc__, _COMMANDS, argv)
  return {"": run, "run": run, "replay": replay}[name](rest)


if __name__ == "__main__":
  cli.run(main)
