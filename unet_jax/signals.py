"""SIGTERM and SIGINT: a training that is told to stop saves first."""

import signal
import sys
import threading

from unet_jax.errors import Interrupted

STOPPING = (signal.SIGTERM, signal.SIGINT)


def end_at_once() -> None:
    """Lets SIGTERM end the program as SIGINT does, by an exception: there is nothing to save yet."""

    def end(number, frame):
        raise Interrupted(f"stopped by {signal.Signals(number).name}; nothing had to be saved", number)

    for number in STOPPING:
        signal.signal(number, end)


class Deferred:
    """Notes signals instead of obeying them while it is entered; another one does not disturb what the first began.

    Attributes:
      received: the first signal, 0 as long as there is none.
    """

    received = 0

    def __enter__(self):
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python does not allow it
            self._before = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def _note(self, number, frame):
        if not self.received:
            self.received = number
            print(f"{signal.Signals(number).name}: saving at the next step", file=sys.stderr, flush=True)

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)
