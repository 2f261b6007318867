"""Times kernels beside other attention; `gnaforge bench` and `gnaforge quickstart`."""
