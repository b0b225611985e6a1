"""Eight virtual CPU devices, a tiny configuration and training, and the real images if there are any."""

import os
import pathlib
import signal
import sys
import tempfile
from collections import Counter

_TFDS = tempfile.TemporaryDirectory()  # prepared data sets stay out of the user's home
os.environ["TFDS_DATA_DIR"] = _TFDS.name
_USER = tempfile.TemporaryDirectory()  # and so do cached images
os.environ["XDG_CACHE_HOME"] = _USER.name
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["JAX_PLATFORMS"] = "cpu"
# The networks of the tests are tiny: compiling them takes far longer than running them. So compile with little
# optimization, and only once what many tests train. In the environment, for the processes that tests start.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share what they compile, with those who started them
    _CACHE = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(4 * 2**30)  # JAX then locks what it writes

# With it set, main.py does not restart itself to set it.
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")

# Background jobs of a shell ignore SIGINT, and so would the processes that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
pytest.register_assert_rewrite("commands", "helpers")

import commands

sys.path.insert(0, str(commands.ROOT))  # for configs/

import tiny

commands.preload()


def pytest_collection_modifyitems(items):
    """Files with many slow tests first: whoever starts one last works on it alone while the others are done."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session")
def real_data():
    """The folder of real images."""
    folder = os.environ.get("UNET_JAX_TEST_DATA")
    if not folder:
        pytest.skip("UNET_JAX_TEST_DATA does not name the folder of real images")
    return pathlib.Path(folder)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The work directory of a short training; tests leave it as it is."""
    from unet_jax.training import loop

    config = tiny.get_config()
    config.train.epochs = 2.0
    path = tmp_path_factory.mktemp("trained") / "run"
    loop.train(config, path)
    return path


@pytest.fixture
def optimized():
    """Compiles as users do: a sum that is not vectorised rounds more often, for some bounds too often."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def config():
    """See `tiny.py`."""
    return tiny.get_config()
