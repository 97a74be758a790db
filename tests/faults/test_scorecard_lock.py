"""One process per run directory, with real processes: the second is told who is first, and a dead one holds nothing."""

import fcntl
import json
import os
import platform
import signal
import time
from contextlib import contextmanager

import pytest

from normfree.cli import run_config
from normfree.errors import EXIT_DIRECTORY, UserError
from normfree.training import session
from normfree.training.locking import LOCK, alone


@contextmanager
def another_process_in(run_dir, lock=alone):
    """A process that holds `run_dir`; killed at the end."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with lock(run_dir):
                os.write(told, b"!")
                time.sleep(60)
        finally:
            os._exit(1)
    try:
        assert os.read(ready, 1) == b"!"
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(told)


def test_the_second_process_is_told_who_is_first(tiny, tmp_path):
    run_dir = tmp_path / "deep" / "run"
    with another_process_in(run_dir) as child:
        words = rf"in use by process {child} on {platform.node()}, since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC"
        with pytest.raises(UserError, match=words) as caught:
            run_config(tiny(run_dir=str(run_dir)))
        assert caught.value.exit_code == EXIT_DIRECTORY
        assert [p.name for p in run_dir.iterdir()] == [LOCK], "nothing was written beside the holder"


def test_a_killed_holder_holds_nothing(tmp_path):
    with another_process_in(tmp_path) as child:
        os.kill(child, signal.SIGKILL)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == child, "its name is still there"
        with alone(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert (tmp_path / LOCK).read_text() == ""


def test_a_lock_by_the_file_alone_is_caught(tmp_path):
    """The control: a lock that is a file outlives its holder."""

    @contextmanager
    def naive(run_dir):
        handle = os.open(run_dir / "naive", os.O_CREAT | os.O_EXCL)
        yield
        os.close(handle)
        os.unlink(run_dir / "naive")

    with another_process_in(tmp_path, naive):
        pass
    with pytest.raises(FileExistsError), naive(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "{", '{"pid": 1}', "[]"])
def test_a_holder_without_a_name_holds_all_the_same(tmp_path, text):
    with open(tmp_path / LOCK, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(text)
        file.flush()
        with pytest.raises(UserError, match="in use by another process"), alone(tmp_path):
            pass


def test_the_session_uses_this_lock():
    assert session.alone is alone


@pytest.mark.parametrize("place", ["/proc/normfree", "/dev/full/run", "file"])
def test_a_place_that_cannot_be_written_is_said_at_once(tmp_path, place):
    (tmp_path / "file").write_text("")
    start = time.monotonic()
    with pytest.raises(UserError, match="cannot be written") as caught, alone(tmp_path / place):
        pass
    assert caught.value.exit_code == EXIT_DIRECTORY
    assert time.monotonic() - start < 2
