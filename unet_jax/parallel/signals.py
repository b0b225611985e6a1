"""Handling of SIGTERM and SIGINT: training saves a checkpoint before it stops."""

import signal
import sys
import threading

from unet_jax.errors import Interrupted

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def end_at_once() -> None:
    """Ends the program by an exception on SIGTERM and SIGINT, for as long as there is nothing to save."""

    def end(number, frame):
        raise Interrupted(f"stopped by {signal.Signals(number).name}; nothing had to be saved", number)

    for number in STOP_SIGNALS:
        signal.signal(number, end)


class Deferred:
    """A context in which stop signals are recorded instead of obeyed; after the first one, further ones are ignored."""

    received = 0  # the number of the first signal; 0 until one arrives

    def __enter__(self):
        self._previous_handlers = {}
        if threading.current_thread() is threading.main_thread():  # Python allows it in no other thread
            self._previous_handlers = {number: signal.signal(number, self._record) for number in STOP_SIGNALS}
        return self

    def _record(self, number, frame):
        if not self.received:
            self.received = number
            print(f"{signal.Signals(number).name}: saving at the next step", file=sys.stderr, flush=True)

    def __exit__(self, *_):
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
