"""Handling of SIGTERM, SIGINT and SIGHUP: training saves a checkpoint before it stops."""

import signal
import threading

from unet_jax.errors import Interrupted
from unet_jax.parallel import streams

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # SIGHUP: the terminal was closed


def stop_signals() -> list[signal.Signals]:
    """The signals that stop this program.

    A signal that was ignored when the program started stays ignored, as shells expect: SIGHUP under `nohup`, and SIGINT
    (Ctrl-C) in the background of a script.
    """
    return [number for number in _STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


def end_at_once() -> None:
    """Ends the program by an exception on a stop signal, for as long as there is nothing to save."""

    def end(number, frame):
        ignore()
        raise Interrupted(f"stopped by {signal.Signals(number).name}; nothing had to be saved", number)

    for number in stop_signals():
        signal.signal(number, end)


def ignore() -> None:
    """Ignores stop signals from now on: the program is about to end, and says why.

    A closed terminal sends more than one, as shells repeat it, and an impatient user too.
    """
    for number in stop_signals():
        signal.signal(number, signal.SIG_IGN)


class Deferred:
    """A context in which stop signals are recorded instead of obeyed; after the first one, further ones are ignored."""

    received = 0  # the number of the first signal; 0 until one arrives

    def __enter__(self):
        self._previous_handlers = {}
        if threading.current_thread() is threading.main_thread():  # Python allows it in no other thread
            self._previous_handlers = {number: signal.signal(number, self._record) for number in stop_signals()}
        return self

    def _record(self, number, frame):
        if not self.received:
            self.received = number  # first, whatever becomes of the message
            streams.write_error(f"{signal.Signals(number).name}: saving at the next step")

    def __exit__(self, *_):
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
