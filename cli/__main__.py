"""``python -m dysurgery.cli``."""

from dysurgery.cli import main

main(prog_name="dysurgery")
