"""From configs to kernels in the cache and libraries that hold them."""
