"""The `gnaforge` command line."""
