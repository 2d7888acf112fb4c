"""``python -m diffsteer``: the command line, also under torchrun."""

from diffsteer.cli import main

main()
