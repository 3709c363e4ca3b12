"""No process outlives its block, orphans included."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

from nestedfp.deployments.processes import is_running, none_left_behind

# A parent that starts a sleeper in a session of its own, tells its pid, and exits at once.
ORPHAN = (
    "import subprocess, sys;"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'],"
    " stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True);"
    "print(child.pid)"
)


def test_an_orphan_ends_with_the_block() -> None:
    with none_left_behind(grace_s=0.2):
        pid = int(subprocess.run([sys.executable, "-c", ORPHAN], capture_output=True, check=True).stdout)
        assert psutil.Process(pid).is_running()
    assert not psutil.pid_exists(pid)


def test_a_process_gets_its_time_to_end() -> None:
    started = time.monotonic()
    with none_left_behind(grace_s=30):
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1)"])
    assert time.monotonic() - started < 15
    assert process.wait() == 0


def test_processes_started_before_are_left_alone() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with none_left_behind(grace_s=0.1):
            pass
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_a_process_is_running_until_it_has_ended() -> None:
    sleeping = shutil.which("sleep")
    assert sleeping is not None
    name = Path(sleeping).name
    assert not is_running(name)
    process = subprocess.Popen([sleeping, "60"])
    assert is_running(name)
    process.kill()
    # A zombie until it is waited for.
    psutil.wait_procs([psutil.Process(process.pid)], timeout=0.5)
    assert not is_running(name)
    process.wait()
