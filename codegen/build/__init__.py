"""From configs to kernels in the cache and libraries that hold them."""

from __future__ import annotations

from ..build_tools import process
from ..runtime.core import process_lock

# Who loads the core holds its lock, and may start a compiler to build it.
process.take_before_fork(process_lock())
