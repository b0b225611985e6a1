"""Communication between the processes of one run; each function also works in a single process.

JAX is imported on first use, so that `--help` does not wait for it.
"""

import contextlib
import difflib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from unet_jax.errors import UserError, escape

START_TIMEOUT = 300  # seconds for all processes to start
_PLAN = "unet_jax/plan"


def is_main() -> bool:
    """Whether this is process 0, which writes logs and files."""
    import jax

    return jax.process_index() == 0


def print_on_main(text: str) -> None:
    """Prints on the main process only; control characters are escaped."""
    if is_main():
        print(escape(text), flush=True)


@contextlib.contextmanager
def main_first(name: str) -> Iterator[None]:
    """Runs the body on the main process first, then on the others, so that it can prepare files for all of them."""
    from jax.experimental import multihost_utils

    if not is_main():
        multihost_utils.sync_global_devices(name)
    yield
    if is_main():
        multihost_utils.sync_global_devices(name)


def broadcast_from_main(function: Callable[..., int | None], *args) -> int | None:
    """Calls `function(*args)` on the main process only and returns its result, an int >= 0 or None, on all of them."""
    import numpy as np
    from jax.experimental import multihost_utils

    value = function(*args) if is_main() else None
    received = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if value is None else value)))
    return None if received == -1 else received


def max_over_processes(value: int) -> int:
    """The maximum of `value` over all processes, returned on each of them."""
    import numpy as np
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.int32(value)).max())


def check_same(plan: Mapping[str, Any]) -> None:
    """Checks that all processes are about to do the same (`plan`, JSON values) with the same package versions.

    If not, a `UserError` shows the difference from process 0.
    """
    state = distributed_state()
    if state.num_processes == 1:
        return
    store, process = state.client, state.process_id
    text = json.dumps({**plan, "versions": versions()}, indent=1, sort_keys=True)
    if process == 0:
        store.key_value_set(_PLAN, text)
    main = store.blocking_key_value_get(_PLAN, START_TIMEOUT * 1000)
    lines = difflib.unified_diff(main.splitlines(), text.splitlines(), n=0)
    diff = "\n".join(f"  {line}" for line in lines if line[0] in "+-" and line[:3] not in ("---", "+++"))
    if diff:
        raise UserError(f"process {process} was started differently from process 0 (- 0, + {process}):\n{diff}")
    wait_for_all(_PLAN, START_TIMEOUT)


def wait_for_all(name: str, timeout: float) -> None:
    """A barrier across processes, of `timeout` seconds, that does not use their devices; each name works once."""
    state = distributed_state()
    if state.num_processes > 1:
        state.client.wait_at_barrier(name, round(timeout * 1000))


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numerical results depend on."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def distributed_state():
    """The state of `jax.distributed`: `client` (with a key-value store), `process_id` and `num_processes`.

    JAX has no public way to the store yet. Unlike `jax.process_index()`, reading this state does not start a backend.
    """
    from jax._src import distributed

    return distributed.global_state
