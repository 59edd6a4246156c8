"""All tests run on CPU with eight fake devices; jaxtyping's shapes are checked at every call of the package."""

import gc
import os
import tempfile

os.environ["JAX_PLATFORMS"] = os.environ.get("TEST_PLATFORM", "cpu")
# Tests compile much and compute little: LLVM's expensive passes cost more than they bring.
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "")
  + " --xla_force_host_platform_device_count=8"
  + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
# The same program is often compiled again, by another test or the other worker: keep all but the smallest.
CACHE = os.path.join(tempfile.gettempdir(), f"semanticvla_jax_tests_{os.getuid()}")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", CACHE)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from jaxtyping import install_import_hook  # noqa: E402

gc.set_threshold(100_000, 50, 50)  # a traced program is millions of objects, and none of them garbage

install_import_hook("semanticvla_jax", "beartype.beartype")

from semanticvla_jax.data import tfrecord_index  # noqa: E402
from semanticvla_jax.evaluate import visualize  # noqa: E402

visualize.SIZE = 64  # drawn at 256 by programs compiled as above, films were a third of an evaluation
tfrecord_index.CACHE = f"{CACHE}_data"


def pytest_collection_modifyitems(items):
  """Training comes first: a worker takes tests from the end of the other's, and would make this file's runs again."""
  items.sort(key=lambda item: item.path.name != "test_train.py")
