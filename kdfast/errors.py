"""Errors with a name of their own."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: the message names what was given, what it should be, and what to do. The command
    line shows it as one line, without a traceback."""


class BackendError(RuntimeError):
    """A backend asked for by name cannot serve a call; `reasons` has each backend's own."""

    def __init__(self, message: str, reasons: dict[str, str]) -> None:
        super().__init__(message)
        self.reasons = reasons


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
