"""Requests to stop a run: SIGTERM, SIGINT, SIGUSR1 or SIGHUP, a file named STOP in the run folder, or a launcher that is gone.

A request only sets a flag. The training loop shares it over all processes once per update, saves, and leaves.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class StopRequest:
    """Watch for a request to stop; as a context manager it restores the previous handlers at the end.

    A signal that comes again within REPEAT_SECONDS is the same request (launchers pass Ctrl-C on to processes that already had
    it); one that comes later ends the process at once. SIGHUP stays ignored where it was, as under nohup.

    A process that torchrun or `accelerate launch` started stops too when its launcher has died: nothing would end it any more,
    and the run could not be started again beside it.
    """

    REPEAT_SECONDS = 3.0

    def __init__(self, stop_file: Path | None) -> None:
        self.stop_file = stop_file
        self.cut_off = False  # set by who finds that the launcher does not answer: it may have died before this line
        self.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.signal: signal.Signals | None = None
        self._noted_at = 0.0
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number)
            self._noted_at = time.monotonic()
        elif time.monotonic() - self._noted_at > self.REPEAT_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self.signal is not None or self._file_asks() or self._is_orphan()

    @property
    def reason(self) -> str:
        """What asked, for messages."""
        if self.signal is not None:
            return self.signal.name
        if self._is_orphan():
            return "the end of its launcher"
        return f"file {self.stop_file}" if self._file_asks() else "a signal to another process"

    def _file_asks(self) -> bool:
        return self.stop_file is not None and self.stop_file.exists()

    def _is_orphan(self) -> bool:
        return self.cut_off or (self.launcher is not None and os.getppid() != self.launcher)

    @property
    def exit_code(self) -> int:
        """128 + the signal's number as shells have it; 0 where no signal to this process asked."""
        return 128 + self.signal if self.signal is not None else 0
