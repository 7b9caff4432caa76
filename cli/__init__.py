"""The command line."""


def main() -> None:
    """Not yet."""
    raise SystemExit("not yet")
