"""The two ways in which a request can fail; the command line turns them into exit codes.

Every message is one clear sentence that says what was given, what was expected and the way out.
"""

import difflib
from collections.abc import Iterable


class DysurgeryError(Exception):
    """It could not be done: weights that cannot be had, a model that does not run, a file in the way (exit code 1)."""


class UsageError(DysurgeryError, ValueError):
    """It was asked for wrongly: an unknown name, a pattern that matches nothing, a value out of range (exit code 2)."""


def did_you_mean(given: str, known: Iterable[str], count: int = 3) -> str:
    """Return `` (did you mean 'a' or 'b'?)`` for the known names nearest to ``given``, or an empty string."""
    near = difflib.get_close_matches(given, list(known), n=count, cutoff=0.6)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""


def sentence(error: BaseException) -> str:
    """Return an error's type and the first sentence of its message, without the advice that may follow it."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "").partition(". ")[0]
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
