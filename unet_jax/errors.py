"""The one exception that a user can cause: `main` prints it without a traceback and exits with 1."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message names the file or field, the value, and the remedy."""


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
