"""The error that a user can mend: shown as one line, without a traceback, by the command line."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: the message names what was given, what it should be, and what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
