"""The command line, in real processes."""

import concurrent.futures
import os
import subprocess
import sys
import time

import pytest
from helpers import ROOT, run, run_main


def test_help_imports_neither_jax_nor_tensorflow():
    program = (
        "import sys, absl.app\n"
        "from unet_jax import main\n"
        "assert not {'jax', 'tensorflow', 'flax', 'clu', 'numpy'} & sys.modules.keys(), sys.modules.keys()\n"
    )
    result = run(sys.executable, "-c", program, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    shown = run_main("--help")
    assert "--workdir" in shown.stdout and "runs/<config name>" in shown.stdout


BAD_INPUT = [
    (["--config=configs/shapes.py", "--config.train.bach_size=8"], "Did you mean 'train.batch_size'?"),
    (["--config", "configs/shapes.py", "--config.batch_size=8"], "Did you mean 'train.batch_size'?"),
    (["--config=configs/shpes.py"], "Did you mean 'configs/shapes.py'?"),
    (["--config=setup.cfg"], "error: --config=setup.cfg: "),
    (["--config=configs/shapes.py", "--split=test"], "--split is for --mode=eval"),
    (["--config=configs/shapes.py", "--config.train.batch_size=many"], "batch_size=many: invalid literal"),
    (["--config=configs/shapes.py", "--config.data.size=64"], "must be (height, width)"),
    (["--config=configs/shapes.py", "--config.model.norm=bach"], "Did you mean 'batch'?"),
    (["--config=configs/carla.py", "--config.data.root=/nowhere"], "CameraRGB"),
    (["--config=configs/shapes.py", "--workdir=/proc/nowhere"], "cannot be written"),
    ([], "--config=configs/shapes.py"),
    (["--mode=eval"], "--workdir is required"),
    (["--mode=eval", "--workdir=/nowhere"], "has no config.json"),
    (["--mode=report", "--workdir=/nowhere"], "has no config.json"),
    (["--mode=predict", "--workdir=/nowhere"], "--input and --output are required"),
    (["--mode=eval", "--workdir=/nowhere", "--input=x"], "--input is for --mode=predict"),
    (["--mode=check"], "--config is required"),
    (["--mode=check", "--config=configs/folder.py", "--config.data.root=/nowhere"], "'/nowhere' is not a folder"),
    (
        ["--mode=check", "--config=configs/folder.py", "--config.data.root=~/no such folder"],
        f"'{os.path.expanduser('~')}/no such folder' is not a folder",
    ),
    (  # the last value counts; two tuples would be joined
        ["--config=configs/shapes.py", "--config.data.size=(8,8)", "--config.data.size=(9,)"],
        "config.data.size = (9,) must be",
    ),
    (["--config=configs/shapes.py", "--config.init_from=/nowhere"], "has no config.json"),
    (
        ["--mode=report", "--workdir=/nowhere", "--tta=flips"],
        "--tta is for --mode=eval and --mode=predict, not for --mode=report",
    ),
    (["--config=configs/shapes.py", "train"], "unexpected argument 'train'"),
    (["--mode=evaluate"], "evaluate"),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """The result of each command of `BAD_INPUT`; two run at a time, as most of their time goes into imports."""
    folder = tmp_path_factory.mktemp("bad")

    def answer(case):
        flags, _ = case
        if not any(flag.startswith("--workdir") for flag in flags) and "--mode=eval" not in flags:
            flags = [*flags, f"--workdir={folder / 'run'}"]
        return run_main(*flags)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(answer, BAD_INPUT))


@pytest.mark.parametrize("index", range(len(BAD_INPUT)), ids=[" ".join(flags) for flags, _ in BAD_INPUT])
def test_bad_input_ends_with_a_message_and_no_traceback(index, answers):
    result, (_, message) = answers[index], BAD_INPUT[index]
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr + result.stdout


@pytest.mark.slow
def test_train_and_evaluate_from_the_command_line(tmp_path):
    settings = ["--config.data.size=(48,48)", "--config.data.shapes_train=16", "--config.data.shapes_validation=4"]
    settings += ["--config.model.features=(4,8)", "--config.train.batch_size=4", "--config.train.epochs=1"]
    settings += ["--config.deterministic=True"]
    # The default work directory is runs/<config name>, in the current folder, whichever that is.
    config = f"--config={ROOT / 'configs' / 'shapes.py'}"
    result = run_main(config, *settings, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for expected in (
        "step 4/4",
        "images/s",
        "waiting for data",
        "left 0:00",
        "memory",
        " parameters: down ",
        "Finished: 4 steps",
    ):
        assert expected in result.stdout
    assert (tmp_path / "runs" / "shapes" / "config.json").exists()
    again = run_main(config, *settings, cwd=tmp_path)
    assert again.returncode == 0 and "is finished" in again.stdout
    scored = run_main("--mode=eval", "--workdir=runs/shapes", "--split=test", cwd=tmp_path)
    assert scored.returncode == 0 and "mean IoU" in scored.stdout
    assert (tmp_path / "runs" / "shapes" / "eval.json").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is used on Linux")
@pytest.mark.parametrize("given", [None, "glibc.malloc.arena_max=8"])
def test_the_program_uses_huge_pages_unless_glibc_is_configured_otherwise(tmp_path, given):
    config = tmp_path / "show.py"
    config.write_text("import os\ndef get_config(): raise ValueError(os.environ['GLIBC_TUNABLES'])\n")
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment |= {"GLIBC_TUNABLES": given} if given else {}
    result = run_main(f"--config={config}", env=environment)
    assert result.returncode == 1
    assert result.stderr.strip().endswith(f"{config}: ValueError: {given or 'glibc.malloc.hugetlb=1'}")


@pytest.mark.slow
def test_compiled_programs_are_kept_in_the_cache_folder_of_the_user_and_found_again(tmp_path):
    hidden = {"JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    settings = ["--config.data.size=(48,48)", "--config.model.features=(4,8)", "--config.train.batch_size=4"]
    kept = []
    for _ in range(2):
        cache = {"XDG_CACHE_HOME": str(tmp_path)}
        result = run_main("--config=configs/shapes.py", *settings, "--mode=plan", env={**environment, **cache})
        assert result.returncode == 0, result.stderr
        kept.append({path.name for path in (tmp_path / "unet_jax" / "compiled").glob("*-cache")})
    assert any(name.startswith("jit_train_step-") for name in kept[0])
    assert kept[0] == kept[1]


def test_installing_again_does_nothing(tmp_path):
    """`scripts/install.sh` compares setup.cfg with the one that was installed."""
    for name in ("setup.cfg", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "installed-test.cfg").write_bytes((ROOT / "setup.cfg").read_bytes())
    started = time.monotonic()
    script = tmp_path / "scripts" / "install.sh"
    subprocess.run(["bash", str(script), "test"], check=True, env={**os.environ, "PYTHON": "/bin/false"})
    assert time.monotonic() - started < 2
