"""``python -m gnaforge``: the command line, where its program is not on PATH."""

from .cli import main

main()
