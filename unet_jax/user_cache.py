"""Where this user keeps what can be made again: `$XDG_CACHE_HOME/unet_jax`, else `~/.cache/unet_jax`."""

import os
import pathlib
import tempfile


def folder(name: str) -> pathlib.Path:
    """A folder that this user can write and that lasts, created where it is missing.

    Where the cache folder cannot be written, as in many containers, it is one below the folder for temporary files.

    Args:
      name: of the folder, one for each kind of thing that is kept.

    Raises:
      OSError: neither can be written, or the second belongs to somebody else.
    """
    home = os.environ.get("XDG_CACHE_HOME", "")
    home = home if os.path.isabs(home) else os.path.expanduser("~/.cache")  # a relative one is none, says the standard
    if os.path.isabs(home):  # without a home "~" stays
        path = pathlib.Path(home, "unet_jax", name)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError:
            pass
        else:
            if os.access(path, os.W_OK | os.X_OK):
                return path
    own = pathlib.Path(tempfile.gettempdir(), f"unet_jax-{os.getuid()}")
    own.mkdir(mode=0o700, exist_ok=True)
    found = own.lstat()  # everybody can write beside it, so that it may have been put there, or be a link
    if found.st_uid != os.getuid() or own.is_symlink() or found.st_mode & 0o022:
        raise PermissionError(f"{own} is not a folder of this user alone")
    (own / name).mkdir(exist_ok=True)
    return own / name
