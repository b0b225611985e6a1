"""The user's folder for what can be recomputed: `$XDG_CACHE_HOME/unet_jax`, else `~/.cache/unet_jax`."""

import os
import pathlib
import tempfile


def folder(name: str) -> pathlib.Path:
    """A folder that this user can write to and that lasts, one per kind of content; created if it is missing.

    If the cache folder cannot be written, as in many containers, or its path is not UTF-8, which JAX cannot open, it is
    below the folder for temporary files.

    Raises:
      OSError: neither can be written, or the second belongs to another user.
    """
    home = os.environ.get("XDG_CACHE_HOME", "")
    home = home if os.path.isabs(home) else os.path.expanduser("~/.cache")  # the standard says to ignore a relative one
    if os.path.isabs(home):  # without a home folder "~" is not expanded
        path = pathlib.Path(home, "unet_jax", name)
        try:
            home.encode()
            path.mkdir(parents=True, exist_ok=True)
        except (OSError, UnicodeEncodeError):
            pass
        else:
            if os.access(path, os.W_OK | os.X_OK):
                return path
    own = pathlib.Path(tempfile.gettempdir(), f"unet_jax-{os.getuid()}")
    own.mkdir(mode=0o700, exist_ok=True)
    found = own.lstat()  # others can write next to it, so it may have been put there, or be a link
    if found.st_uid != os.getuid() or own.is_symlink() or found.st_mode & 0o022:
        raise PermissionError(f"{own} is not a folder that only this user can write to")
    (own / name).mkdir(exist_ok=True)
    return own / name
