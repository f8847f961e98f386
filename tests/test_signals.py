"""Requests to stop: signals set a flag, a repeated one is forgiven for a while, a STOP file does the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from taylorvit import signals
from taylorvit.signals import StopRequest

SIGNALS = list(signals.SIGNALS)

# A program that waits for a request, says why, works on for two seconds and leaves; the module alone starts in no time.
PROGRAM = """
import importlib.util, pathlib, sys, time
spec = importlib.util.spec_from_file_location("signals", sys.argv[1])
signals = importlib.util.module_from_spec(spec)
spec.loader.exec_module(signals)
signals.StopRequest.REPEAT_SECONDS = float(sys.argv[2])
with signals.StopRequest(pathlib.Path(sys.argv[3])) as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print(stop.reason, flush=True)
    time.sleep(float(sys.argv[4]))
sys.exit(stop.exit_code)
"""


@pytest.fixture
def stop_file(tmp_path: Path) -> Path:
    return tmp_path / "STOP"


@pytest.fixture(autouse=True)
def _handlers_as_they_were() -> Iterator[None]:
    ignored = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it for what it starts
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        assert signal.getsignal(number) is handler
    signal.signal(signal.SIGHUP, ignored)


def start(stop_file: Path, *, repeat_seconds: float, works_on: float) -> subprocess.Popen[str]:
    arguments = [str(signals.__file__), str(repeat_seconds), str(stop_file), str(works_on)]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.fault("A4")
@pytest.mark.fault("A5")
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_interrupts_nothing(stop_file: Path, number: signal.Signals) -> None:
    with StopRequest(stop_file) as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
        assert (stop.reason, stop.exit_code) == (number.name, 128 + number)
    assert stop.exit_code == 128 + number  # still, after the handlers are gone


def test_a_signal_from_another_process_is_noted(stop_file: Path) -> None:
    with StopRequest(stop_file) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert stop.reason == "SIGTERM"


@pytest.mark.fault("A7")
@pytest.mark.parametrize("number", SIGNALS)
def test_quick_further_signals_are_the_same_request(stop_file: Path, number: signal.Signals) -> None:
    process = start(stop_file, repeat_seconds=60, works_on=0.3)
    process.send_signal(number)
    assert said(process) == number.name
    for further in (number, signal.SIGINT, signal.SIGTERM):
        process.send_signal(further)
        time.sleep(0.02)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (128 + number, "")


@pytest.mark.fault("A7")
@pytest.mark.parametrize("number", SIGNALS)
def test_a_late_second_signal_kills(stop_file: Path, number: signal.Signals) -> None:
    process = start(stop_file, repeat_seconds=0.1, works_on=60)
    process.send_signal(number)
    assert said(process) == number.name
    time.sleep(0.2)
    process.send_signal(number)
    assert process.wait(timeout=20) == -number
    process.communicate()


def test_handlers_come_back_after_an_error(stop_file: Path) -> None:
    def fail() -> None:
        with StopRequest(stop_file):
            assert signal.getsignal(signal.SIGTERM) is not before
            raise RuntimeError("oops")

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="oops"):
        fail()
    assert signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c_is_a_keyboard_interrupt_again_afterwards(stop_file: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts with &
    with StopRequest(stop_file):
        pass
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


@pytest.mark.fault("A9")
def test_a_stop_file_is_a_request(stop_file: Path) -> None:
    with StopRequest(stop_file) as stop:
        assert not stop.requested
        stop_file.touch()
        assert stop.requested
        assert (stop.reason, stop.exit_code) == (f"file {stop_file}", 0)
        signal.raise_signal(signal.SIGTERM)
        assert (stop.reason, stop.exit_code) == ("SIGTERM", 143)


@pytest.mark.fault("A9")
def test_a_stop_file_is_seen_while_the_program_runs(stop_file: Path) -> None:
    process = start(stop_file, repeat_seconds=60, works_on=0)
    stop_file.touch()
    assert said(process) == f"file {stop_file}"
    assert process.wait(timeout=20) == 0
    process.communicate()


def test_a_process_that_was_not_asked_says_so(stop_file: Path) -> None:
    with StopRequest(stop_file) as stop:
        assert (stop.requested, stop.reason, stop.exit_code) == (False, "a signal to another process", 0)


def test_a_process_may_look_for_no_file(stop_file: Path) -> None:
    stop_file.touch()
    with StopRequest(None) as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested


def test_a_hangup_that_was_ignored_stays_ignored(stop_file: Path) -> None:
    """A run under nohup outlives its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest(stop_file) as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.fault("A1")
def test_a_launcher_that_is_gone_is_a_request(stop_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with StopRequest(stop_file) as stop:
        assert not stop.requested
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert (stop.requested, stop.reason, stop.exit_code) == (True, "the end of its launcher", 0)
    with StopRequest(stop_file) as stop:  # it died before the watch began, which the launcher's silence told
        assert not stop.requested
        stop.cut_off = True
        assert stop.requested
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    with StopRequest(stop_file) as stop:  # started by hand: a shell may go
        monkeypatch.setattr(os, "getppid", lambda: 7)
        assert not stop.requested
