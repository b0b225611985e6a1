"""The exceptions that end the program without a traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input; exit code 1. The message names the file or field, the value, and the remedy."""


class Interrupted(BaseException):  # so that whoever catches the errors of a library does not stop it
    """A signal ended the work, and what was done is saved; exit code 128 + `signal`."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


def check_choice(field: str, value: str, choices: Iterable[str]) -> str:
    """Returns `value` if it is one of `choices`.

    Args:
      field: what the user would change, such as `config.optimizer.name`.

    Raises:
      UserError: it is not; names the choices and the nearest one.
    """
    choices = list(choices)
    if value in choices:
        return value
    raise UserError(f"{field} = {value!r} is not one of: {', '.join(choices)}.{did_you_mean(value, choices)}")


def did_you_mean(value: str, choices: Iterable[str]) -> str:
    """A hint at the nearest of `choices`, with a space before it; nothing where none is near."""
    near = difflib.get_close_matches(str(value), list(choices), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
