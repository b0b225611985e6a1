"""What becomes of standard output and error stops no work; see also `test_survival.py`, with whole trainings."""

import os
import signal
import subprocess
import sys
import time

import commands
import helpers


def program(body, **settings):
    """Starts a Python program that has called `guard`."""
    code = f"import sys\nfrom unet_jax.parallel import signals, streams\nstreams.guard()\n{body}"
    return subprocess.Popen([sys.executable, "-c", code], cwd=commands.ROOT, **settings)


def test_descriptors_that_are_closed_at_the_start_are_given_to_no_file(tmp_path):
    body = """
with open(sys.argv[1], "w") as file:
    assert file.fileno() > 2 and not sys.stdout.isatty()
    print("out")
    print("error", file=sys.stderr)
    os.write(1, b"out")
    os.write(2, b"error")
    file.write("written")
"""
    guarded = f"from unet_jax.parallel import streams; import os, sys; streams.guard()\n{body}"
    closed = 'exec "$@" 0<&- 1>&- 2>&-'
    command = ["bash", "-c", closed, "bash", sys.executable, "-c", guarded, tmp_path / "file"]
    assert subprocess.run(command, cwd=commands.ROOT).returncode == 0
    assert (tmp_path / "file").read_text() == "written"

    # The program restarts itself, and its exit code is still its own.
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    main = [sys.executable, "-m", "unet_jax.main", "--mode=eval", "--workdir=/nowhere"]
    result = helpers.run("bash", "-c", closed, "bash", *main, cwd=commands.ROOT, env=environment)
    assert result.returncode == 1


def test_a_full_disk_is_named_once_and_no_error():
    body = "for _ in range(3): print('line')"
    with open("/dev/full", "w") as full:
        process = program(body, stdout=full, stderr=subprocess.PIPE, text=True)
    assert process.communicate() == (None, "standard output: No space left on device; going on without it\n")
    assert process.returncode == 0


def test_a_slow_reader_of_a_nonblocking_pipe_gets_everything():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    process = program("for i in range(3000): print(f'{i:0100}')", stdout=writer)
    os.close(writer)
    time.sleep(0.3)
    with open(reader) as file:
        assert [int(line) for line in file] == list(range(3000))
    assert process.wait(60) == 0


def test_characters_that_the_encoding_lacks_are_escaped():
    # The second is how Python reads a byte of a file name that is not UTF-8.
    for encoding, expected in (("ascii", b"\\xe4 \\udce4\n"), ("utf-8", b"\xc3\xa4 \\udce4\n")):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        process = program(r"print('\xe4 \udce4')", stdout=subprocess.PIPE, env=environment)
        assert process.communicate() == (expected, None) and process.returncode == 0


def test_a_signal_in_the_middle_of_a_print_is_recorded():
    body = """
with signals.Deferred() as deferred:
    while not deferred.received:
        print("x" * 10_000, file=sys.stderr)
sys.exit(deferred.received)
"""
    process = program(body, stderr=subprocess.PIPE)
    process.stderr.readline()
    time.sleep(0.2)  # the pipe is full, and the program waits in `print`
    process.send_signal(signal.SIGTERM)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == signal.SIGTERM and b"SIGTERM: saving at the next step" in printed
