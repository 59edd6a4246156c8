import policies
import pytest
import serving


@pytest.fixture(scope="session")
def policy():
  """Tiny, compiled for one and four observations; what is served, and what its answers are compared with."""
  return policies.policy(batch_sizes=(1, 4), metadata={"dataset": "tabletop_place", "policy_hash": "0123456789abcdef"})


@pytest.fixture(scope="module")
def served(policy):
  """(site, port) of one server for the tests of a module."""
  with serving.serving(policy) as found:
    yield found
