"""Figures as people read them, in a terminal and on a page."""


def count(value: float, digits: int = 4) -> str:
    """Format a number of parameters or Mult-Adds: 576, 36.86k, 11.69M, 1.861G."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * (1 - 0.5 * 10.0**-digits):
            return f"{value / limit:.{digits}g}{unit}"
    return f"{value:.{digits}g}"


def change(before: float, after: float) -> tuple[str, str]:
    """Return the difference and the percentage, both signed."""
    sign = "+" if after >= before else "-"
    percent = f"{(after - before) / before:+.1%}" if before else "-"
    return f"{sign}{count(abs(after - before))}", percent
