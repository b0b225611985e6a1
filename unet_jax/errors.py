"""The exceptions that end the program without a traceback, and how they are reported."""

import difflib
import importlib
import re
import traceback
from collections.abc import Iterable
from types import ModuleType

# A terminal obeys the first, no encoding has the second (bytes of a file name that are not UTF-8).
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]|[\ud800-\udfff]")


class UserError(Exception):
    """Bad input; exit code 1. The message names the file or field, the value, and the remedy."""

    def __init__(self, message: str):
        super().__init__(escape(message))


class Interrupted(BaseException):  # not an Exception, so that code which catches those does not swallow it
    """The program stops on a signal, with everything saved; exit code 128 + `signal`."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


def escape(text: str) -> str:
    """Escapes control characters, but for tabs and line breaks: names in files must not steer the terminal."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def escape_line(text: str) -> str:
    """A name or path on one line, for a screen or a picture; what cannot be shown is escaped as Python would."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_name(text: str) -> bool:
    """Whether a class may have this name: no control characters, not even tabs and line breaks."""
    return escape(text) == text and not {"\t", "\n"} & set(text)


def import_extra(name: str, extra: str) -> ModuleType:
    """Imports a package that only an extra of `setup.cfg` installs; a `UserError` if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise UserError(
            f"the package {package} is needed, but not installed: run scripts/install.sh {extra}, or "
            f'pip install "unet_jax[{extra}]"'
        ) from error


def check_choice(field: str, value: str, choices: Iterable[str]) -> str:
    """Returns `value` if it is one of `choices`; else a `UserError` lists them and suggests the closest one.

    `field` is the setting as the user knows it, such as `config.optimizer.name`.
    """
    choices = list(choices)
    if value in choices:
        return value
    raise UserError(f"{field} = {value!r} is not one of: {', '.join(choices)}.{did_you_mean(value, choices)}")


def did_you_mean(value: str, choices: Iterable[str]) -> str:
    """Suggests the closest of `choices`, with a leading space; an empty string if none is close."""
    close = difflib.get_close_matches(str(value), list(choices), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def describe(error: BaseException) -> tuple[str, int]:
    """The text to print for an exception that ends the program, and the exit code."""
    is_tensorflow = type(error).__module__ == "tensorflow.python.framework.errors_impl"  # such as an unreachable bucket
    text, code = "".join(traceback.format_exception(error)).rstrip(), 1
    if isinstance(error, UserError) or is_tensorflow:
        text = f"error: {error}"
    elif isinstance(error, Interrupted):
        text, code = str(error), 128 + error.signal
    elif isinstance(error, SystemExit):
        text, code = f"ends with exit code {error.code}", error.code if isinstance(error.code, int) else 1
    return escape(text), code
