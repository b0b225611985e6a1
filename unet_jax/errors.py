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
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UserError(f"{field} = {value!r} is not one of: {', '.join(choices)}.{hint}")
