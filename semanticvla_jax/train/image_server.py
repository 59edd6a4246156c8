"""python -m semanticvla_jax.train.image_server --config=configs/libero.py:full@7b --config.data.dir=DIR

Makes the images of a run's batches on a CPU host, for training hosts that wait for their input. Start it, with the
run's config, on each CPU host that reads the same datasets, and name all of them to the run:

    python -m semanticvla_jax.train --config=… --workdir=… --config.data.servers="('cpu-0:5050', 'cpu-1:5050')"

The batches are those of a run without servers. It serves any number of runs with the same data and options until it is
stopped, to everybody who reaches its ports: --port and the two after it belong in a private network.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import threading

import jax
from absl import app, flags
from ml_collections import config_flags

from semanticvla_jax import cli, sources
from semanticvla_jax.data import image_server
from semanticvla_jax.errors import refuse
from semanticvla_jax.train import command_line, config_checks, distributed, from_specs, init, inputs


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  jax.config.update("jax_platforms", "cpu")  # the accelerator, where there is one, is a training run's
  distributed.set_up_logging()
  try:
    config = from_specs.resolve(_CONFIG.value)
    config_checks.check(config)
    if sources.generator(config) is not None:
      mixture = f"{config.data.mixture!r}, whose examples are made on the accelerator"
      raise refuse("config.data.mixture", mixture, "datasets", "train without servers")
    _, bare = init.make_model(config)
    loader, datasets = inputs.rlds_loader(config, bare, inputs.load_tokenizers(config, bare))
    server = image_server.ImageServer(loader, _HOST.value, _PORT.value, _WORKERS.value, config.data.processes)
  except ValueError as error:
    sys.exit(f"error: {error}")
  stop = threading.Event()
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: stop.set())
  with contextlib.closing(server):
    print(f"images of {', '.join(one.name for one in datasets)} at {server.address}", flush=True)
    stop.wait()


if __name__ == "__main__":
  _CONFIG = config_flags.DEFINE_config_file("config", None, "Config file and argument of the training run")
  _HOST = flags.DEFINE_string("host", socket.gethostname(), "Name under which training hosts reach this machine")
  _PORT = flags.DEFINE_integer("port", image_server.PORT, "First of three ports; 0: any that are free")
  _WORKERS = flags.DEFINE_integer("workers", None, "Threads that read; none: one per core, at most 16")
  flags.mark_flag_as_required("config")
  cli.run(lambda _: app.run(main, flags_parser=command_line.parse), keep_compiled=False)
