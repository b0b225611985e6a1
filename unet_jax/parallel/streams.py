"""Standard output and error of a program that goes on working when nobody can read them."""

import contextlib
import errno
import io
import os
import select
import sys


def guard() -> None:
    """Makes standard output and error safe to write to, whatever happens to them; a program calls it first.

    A reader may leave (`| head`), a disk fill up, a terminal be closed: what cannot be written is dropped, and neither
    the work nor the exit code changes. Characters that the encoding lacks are escaped. Descriptors that were closed at
    the start (`2>&-`) are opened on the null device: otherwise the next file, such as a checkpoint, would get the
    number 2, and with it what libraries print.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed, and so the lowest free number, which `open` takes
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        before = getattr(sys, name)  # None if it was closed
        if before is not None:
            with contextlib.suppress(OSError):
                before.flush()
        buffered = io.BufferedWriter(_Descriptor(descriptor, "w", closefd=False))
        encoding = getattr(before, "encoding", None)
        setattr(sys, name, io.TextIOWrapper(buffered, encoding, "backslashreplace", line_buffering=True))


def write_error(text: str) -> None:
    """Writes a line to standard error at once; for signal handlers, which may interrupt a `print` in its middle."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


class _Descriptor(io.FileIO):
    """Drops what cannot be written, so that the output goes on if there is room on the disk again."""

    _failed = False

    def write(self, data) -> int:
        try:
            while (written := super().write(data)) is None:  # a non-blocking pipe is full
                select.select([], [self], [])
            return written
        except OSError as error:
            if not self._failed and self.fileno() == 1 and error.errno != errno.EPIPE:  # a reader knows that it left
                write_error(f"standard output: {error.strerror}; going on without it")
            self._failed = True
            return len(data)
