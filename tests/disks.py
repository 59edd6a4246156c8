"""A folder on a small file system, for tests that fill the disk."""

import contextlib
import os
import pathlib
import subprocess
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def small(folder: pathlib.Path, size: str) -> Iterator[pathlib.Path]:
  """Mounts a tmpfs of `size`, as "400k", on the new `folder`; skips the test where that is not allowed."""
  folder.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
  if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
    pytest.skip("a small tmpfs cannot be mounted here: needs root and CAP_SYS_ADMIN")
  try:
    yield folder
  finally:
    subprocess.run(["umount", "-l", str(folder)], check=True)
