"""Signals that ask a run to stop: it finishes the step, saves, and says so. A second one ends the process at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

# SIGUSR1 and SIGUSR2: what batch systems are told to send some time before they end a job.
ASKED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class Preempted(Exception):
    """Raised by the training loop after the checkpoint of `step` was written."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"{signal.Signals(signum).name} at step {step}")
        self.signum, self.step = signum, step

    @property
    def exit_code(self) -> int:
        return 128 + self.signum


class Signals:
    """What has been asked for so far: `received` is None, or the signal's number."""

    def __init__(self) -> None:
        self.received: int | None = None

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + signum)  # nothing is lost: whatever is written is written beside and renamed, or appended
        self.received = signum
        with suppress(OSError):  # a closed pipe or terminal must not cost the checkpoint
            os.write(2, b"\nstopping after this step, and saving; once more ends the process at once\n")

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catch the signals inside; what handled them before does so again after. In the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {signum: signal.signal(signum, self._handle) for signum in ASKED}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
