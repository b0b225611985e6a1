"""What happens to a training, and what becomes of it: signals, kills, full disks, damaged files, dead peers."""

import json
import random
import shutil
import signal
import time

import commands
import pytest

from unet_jax import checkpoint, workdir

FLAGS = (f"--config={commands.TINY}", "--config.train.panels=0")


def _flags(path, *more):
    return (*FLAGS, f"--workdir={path}", *more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A training that was never interrupted."""
    path = tmp_path_factory.mktemp("finished") / "run"
    t=time.time()
    commands.succeed(*_flags(path), folder=path.parent)
    print("took", time.time()-t)
    return path


def test_x(finished, tmp_path):
    t=time.time()
    commands.succeed(*_flags(tmp_path/"run"), folder=tmp_path)
    print("took", time.time()-t)
    t=time.time()
    cs=commands.start_cluster(*_flags(tmp_path/"run2"), folder=tmp_path, devices=4)
    print([c.wait() for c in cs], time.time()-t)
    print(cs[1].output)
    assert 0
