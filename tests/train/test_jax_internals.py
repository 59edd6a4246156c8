"""The names of jax that are not public: each is still there, and answers as this package needs."""

import socket

from jax._src.lib import _jax

from semanticvla_jax.train import jax_internals


def test_names_without_a_public_equivalent_are_there():
  assert jax_internals.coordination_client() is None  # jax.distributed was not started
  assert jax_internals.on_gce_tpu() is False
  assert len(jax_internals.detect_cluster(None, 1)) == 4


def test_a_client_of_the_coordination_service_waits_at_a_barrier():
  """With a service of this process alone: the arguments are those that `distributed.barrier` passes."""
  with socket.create_server(("", 0)) as server:
    address = f"localhost:{server.getsockname()[1]}"
  service = _jax.get_distributed_runtime_service(address.replace("localhost", "[::]"), 1)
  client = _jax.get_distributed_runtime_client(address, 0)
  try:
    client.connect()
    client.wait_at_barrier("alone", 5000)
  finally:
    client.shutdown()
    service.shutdown()
