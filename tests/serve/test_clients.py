"""Clients as their projects publish them, unmodified, over loopback: actions equal `Policy.infer` bit for bit."""

import pytest
from serving import equal, observation

pytestmark = pytest.mark.clients


def test_openpi_client(served, policy):
  client = pytest.importorskip("openpi_client.websocket_client_policy", reason="make serve-test installs openpi-client")
  from openpi_client import action_chunk_broker

  remote = client.WebsocketClientPolicy("127.0.0.1", served[1])
  assert remote.get_server_metadata()["policy_hash"] == policy.metadata["policy_hash"]
  for seed in range(2):
    assert equal(remote.infer(observation(seed))["actions"], policy.infer(observation(seed))["actions"])
  with pytest.raises(RuntimeError, match="lacks 'image'"):
    remote.infer({"prompt": "pick up the red cube"})
  broker, chunk = action_chunk_broker.ActionChunkBroker(remote, 8), policy.infer(observation(5))["actions"]
  assert all(equal(broker.infer(observation(5))["actions"], chunk[i]) for i in range(8))
