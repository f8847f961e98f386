"""Batches from worker processes: what could not be read is told beside each batch, and a worker's failure is one line.

PyTorch waits for ever for a worker that hangs, and reports one that died once, from wherever the training process happens to
be: a report that comes up inside a callback is lost.
"""

from __future__ import annotations

import atexit
import multiprocessing
import re
import signal
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.data._utils import signal_handling
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from taylorvit.config import DataConfig

WORKER_NAME = "image loader"
PATIENCE = 0.8  # of timeout_seconds: the other processes wait in a collective that long, and should hear the cause instead
POLL_SECONDS = 5.0  # after which PyTorch looks whether a worker died whose report was lost
DEATH_SECONDS = 2.0  # between the first sign of a worker's death and its exit code
Collate = Callable[[list[Any]], Any]

# What the system says where a limit is reached, and what helps.
_LIMITS = (
    (
        r"Bus error|shared memory|</torch_|No space left on device",
        "the shared memory (/dev/shm) is full: set data.num_workers or data.prefetch_factor lower, or enlarge it (docker run "
        "--shm-size=8g)",
    ),
    (r"Too many open files|ancdata", "raise the limit of open files (ulimit -n), or set data.num_workers lower"),
    (
        r"Resource temporarily unavailable|Cannot allocate memory",
        "the memory or the limit of processes (ulimit -u) does not suffice: set data.num_workers lower",
    ),
)
# What PyTorch says where a worker is lost, and what is behind it, most often.
_CAUSES = (
    *_LIMITS,
    (
        r"signal: Killed",
        "most often the memory ran out: set data.num_workers or data.prefetch_factor lower; the kernel's log (dmesg) tells",
    ),
    (
        r"Segmentation fault|Aborted|Illegal instruction|Floating point|signal: (Bad|Trace)",
        "a library crashed, perhaps over a damaged image: with data.num_workers 0 it crashes in the training process",
    ),
    (r"signal: ", "something outside of the run ended it"),
    (r"", "something in it ended the process: with data.num_workers 0 it would end the training process"),
)


class Unreadable(NamedTuple):
    """A sample that could not be read, by its number, and why."""

    number: int
    message: str


class LoaderError(ChildProcessError):
    """A worker of a loader cannot start, died or hangs; the message names it and the likely cause."""


class Loader(DataLoader):
    """A DataLoader over pairs (sample or None, `Unreadable` or None).

    It yields the samples' batches and notes what could not be read in `unreadable`, by number. Its workers answer within a
    time, and are ended when the process exits, see `_end_workers`.

    Args:
        dataset: gives the pairs.
        data: workers, prefetching, pinned memory.
        collate: makes a batch of samples.
        timeout_seconds: of the run, see PATIENCE; without workers it has no effect.
        persistent: whether the workers stay for the next iteration.
        options: of the DataLoader.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        data: DataConfig,
        collate: Collate | None,
        timeout_seconds: float,
        persistent: bool,
        **options: Any,
    ) -> None:
        if data.num_workers > 0:
            options |= {"prefetch_factor": data.prefetch_factor, "persistent_workers": persistent}
            options |= {"worker_init_fn": init_worker, "timeout": min(POLL_SECONDS, PATIENCE * timeout_seconds)}
        super().__init__(
            dataset,
            num_workers=data.num_workers,
            collate_fn=partial(_collate_pairs, collate=collate or default_collate),
            pin_memory=data.pin_memory and torch.cuda.is_available(),
            generator=torch.Generator(),  # else every iter() would draw from the global generator
            **options,
        )
        self.patience = PATIENCE * timeout_seconds
        self.unreadable: dict[int, str] = {}

    def __iter__(self) -> Any:
        try:
            iterator = super().__iter__()
        except OSError as error:  # even their queues need shared memory and files
            limit = _explain_limit(str(error))
            if limit is None:
                raise
            raise LoaderError(f"the loader's workers cannot start: {limit}") from error
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            _ITERATORS.add(iterator)
            for worker in iterator._workers:
                worker.name = WORKER_NAME
        return self._batches(iterator)

    def _batches(self, iterator: Iterator[tuple[Any, list[Unreadable]]]) -> Iterator[Any]:
        waits_since = time.monotonic()
        while True:
            try:
                batch, problems = next(iterator)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                if str(error).startswith("DataLoader timed out"):
                    if time.monotonic() - waits_since < self.patience:
                        continue
                    raise _give_up(iterator, self.patience) from error
                if lost := _lost_worker(iterator, error):
                    raise LoaderError(lost) from error
                raise
            self.unreadable |= {problem.number: problem.message for problem in problems}
            if batch is not None:
                yield batch
            waits_since = time.monotonic()


def _collate_pairs(pairs: Sequence[tuple[Any, Unreadable | None]], *, collate: Collate) -> tuple[Any, list[Unreadable]]:
    samples = [sample for sample, _ in pairs if sample is not None]
    return collate(samples) if samples else None, [problem for _, problem in pairs if problem is not None]


def _give_up(iterator: Any, seconds: float) -> LoaderError:
    """Kill the workers of an iterator, one of which has not answered, and return the error that says so."""
    number = iterator._task_info[iterator._rcvd_idx][0]
    text = (
        f"{_name(iterator._workers[number].pid)} has given no batch for {seconds:g} s (4/5 of timeout_seconds) and was killed"
    )
    _forget_workers(iterator)
    for worker in iterator._workers:
        worker.kill()
    return LoaderError(f"{text}: most likely the storage of data.root does not answer")


def _forget_workers(iterator: Any) -> None:
    """Let PyTorch report no further death of these workers, which it would do in the place of what is to be said."""
    signal_handling._remove_worker_pids(id(iterator))
    iterator._worker_pids_set = False


def _lost_worker(iterator: Any, error: Exception) -> str | None:
    """Explain an error of a batch's way by the worker that died, None if none did.

    A worker that dies with a batch on its way closes the connection first, so that its end may come a moment later.
    """
    if not isinstance(iterator, _MultiProcessingDataLoaderIter) or "Caught " in str(error):  # of the data set, passed on
        return None
    _forget_workers(iterator)
    deadline = time.monotonic() + DEATH_SECONDS
    while time.monotonic() < deadline:
        for worker in iterator._workers:
            if not worker.is_alive() and worker.pid is not None:
                return _explain_end(worker.pid, str(error))
        time.sleep(0.02)
    return None


@contextmanager
def explained_loader_failures() -> Iterator[None]:
    """Turn PyTorch's report of a dead worker, which can come up anywhere in the block, into a LoaderError of one line."""
    try:
        yield
    except RuntimeError as error:
        explained = explain_failure(str(error))
        if explained is None:
            raise
        raise LoaderError(explained) from error


def explain_failure(text: str) -> str | None:
    """Return one line for what PyTorch says of a loader that lost a worker, None for any other message."""
    if "DataLoader worker" not in text and "with the workers" not in text:
        return None
    found = re.search(r"DataLoader worker \(pid(?:\(s\))? ([0-9, ]+)\)", text)
    if found is None:  # not dead, but it could not pass a batch on
        limit = _explain_limit(text)
        return limit and f"a loader worker cannot pass its batch on: {limit}"
    return _explain_end(int(found[1].split(",")[0]), text)


def _explain_limit(text: str) -> str | None:
    return next((advice for pattern, advice in _LIMITS if re.search(pattern, text)), None)


def _explain_end(pid: int, text: str) -> str:
    """Name a dead worker, how it ended by its exit code, or else by PyTorch's text, and the likely cause."""
    worker = next((worker for iterator in list(_ITERATORS) for worker in iterator._workers if worker.pid == pid), None)
    code = worker.exitcode if worker is not None else None
    if code is None:
        found = re.search(r"(?:killed by signal: [A-Za-z ]+|exited unexpectedly(?: with exit code \d+)?)", text)
        end = found[0] if found else "exited unexpectedly"
    else:
        end = f"killed by signal: {signal.strsignal(-code)}" if code < 0 else f"exited unexpectedly with exit code {code}"
    cause = next(advice for pattern, advice in _CAUSES if re.search(pattern, end))
    return f"{_name(pid)} {'was ' if 'signal' in end else ''}{end.replace('by signal: ', 'by the signal ')}: {cause}"


def _name(pid: int) -> str:
    numbers = (number for iterator in list(_ITERATORS) for number, worker in enumerate(iterator._workers) if worker.pid == pid)
    number = next(numbers, None)
    return f"loader worker (process {pid})" if number is None else f"loader worker {number} (process {pid})"


def _end_workers(iterators: weakref.WeakSet[_MultiProcessingDataLoaderIter]) -> None:
    """Ask all workers to leave, and kill those left over, as by an iterator that was garbage in a reference cycle.

    At exit Python sends SIGTERM to child processes and waits for them, for ever if they ignore it, as ours do.
    """
    for iterator in list(iterators):
        iterator._shutdown_workers()
    for process in multiprocessing.active_children():
        if process.name == WORKER_NAME:
            process.kill()


# Weak references: a finished iterator must not keep the pipes of its workers open.
_ITERATORS: weakref.WeakSet[_MultiProcessingDataLoaderIter] = weakref.WeakSet()
atexit.register(_end_workers, _ITERATORS)  # multiprocessing was imported above, so this runs before it waits at exit


def init_worker(worker_id: int) -> None:
    """Prepare a loader worker: one thread, and the signals that end a run ignored, for the training process answers them."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
