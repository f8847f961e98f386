"""The drill: train, kill at random moments with SIGKILL, resume, and compare the end with an undisturbed run bit for bit.

A case is one run of a few hundred updates on one or two processes with a seed of its own, loader workers, augmentation, mixing,
drop path, LAMB and averaged weights, on scikit-learn's digits. It is started again and again and killed each time, half of the
times while a checkpoint is being written; after KILLS_PER_CASE kills it may finish. Everything is written down as it happens,
so that a drill that was interrupted continues where it was.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taylorvit.checkpoint import CheckpointError, find_newest_valid, list_checkpoints, verify_checkpoint
from taylorvit.run_folder import RunFolder
from taylorvit.studies.fault_runs import (
    ROOT,
    SMALL_RUN,
    differences,
    history,
    kill,
    parts,
    process_tree,
    seconds_until_gone,
    start_run,
)

KILLS_PER_CASE = 15
SAVE_EVERY = 3  # updates
GONE_SECONDS = 90.0  # after which what is left of a killed run counts as an orphan
PATIENCE_SECONDS = 300.0  # for the moment to kill, and for a run to finish
MOMENTS = ("checkpoint", "checkpoint", "update", "start")  # half of the kills are aimed at a checkpoint
VICTIMS = {1: ("all", "rank", "worker"), 2: ("all", "rank", "launcher", "worker")}

SETTINGS = SMALL_RUN | {
    "data.dataset": "digits",
    "data.train_split": "train[:20%]",
    "schedule.epochs": 20,
    "train.global_batch_size": 32,
    "train.micro_batch_size": 8,
    "evaluate.every_epochs": 5,
    "checkpoint.every_updates": SAVE_EVERY,
    "checkpoint.keep_last": 3,
}


class DrillError(RuntimeError):
    """A run that nobody disturbed did not start or did not end."""


@dataclass(frozen=True)
class Case:
    """One run that is killed many times.

    Args:
        out: folder of the drill.
        processes: of the run.
        seed: of the run, and of the moments and victims of its kills.
    """

    out: Path
    processes: int
    seed: int

    @property
    def name(self) -> str:
        """Name of the case, its folder and its log."""
        return f"{self.processes}-{self.seed}"

    @property
    def run(self) -> RunFolder:
        """The run that is killed."""
        return RunFolder(self.out / "runs" / self.name)

    def start(self, run_dir: Path) -> subprocess.Popen[str]:
        """Start the case's run, or its undisturbed twin, in a folder."""
        own = {"run_dir": run_dir, "seed": self.seed, "data.root": self.out / "digits", "resume": "auto"}
        arguments = [f"--{key}={value}" for key, value in (SETTINGS | own).items()]
        return start_run("train.py", arguments, processes=self.processes, log=run_dir.with_suffix(".log"))


def run_drill(out: Path, *, kills: int, seed: int, processes: list[int], say: Callable[[str], None] = print) -> None:
    """Kill until the drill's folder holds `kills` kills and every case has ended.

    Raises:
        DrillError: an undisturbed run did not end.
    """
    for folder in ("runs", "undisturbed"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    number = 0
    while True:
        case = Case(out, processes[number % len(processes)], seed + number // len(processes))
        ended = {record["case"] for record in read_records(out / "cases.jsonl")}
        counted = len(read_records(out / "kills.jsonl"))
        if counted >= kills and (case.name not in _begun(out) or case.name in ended):
            return
        if case.name not in ended:
            say(f"case {case.name}: {case.processes} process(es), seed {case.seed}; {counted} of {kills} kills done")
            _run_case(case, left=kills - counted, say=say)
        number += 1


def read_records(file: Path) -> list[dict[str, Any]]:
    """Return the records of a JSON lines file, none if it is not there."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def _append(file: Path, record: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")


def _begun(out: Path) -> set[str]:
    return {record["case"] for record in read_records(out / "kills.jsonl")}


def _run_case(case: Case, *, left: int, say: Callable[[str], None]) -> None:
    """Kill the case's run until it has had its share of kills, let it finish, and compare."""
    done = sum(record["case"] == case.name for record in read_records(case.out / "kills.jsonl"))
    for number in range(done, min(KILLS_PER_CASE, done + left)):
        record = _kill_once(case, number)
        if record is None:  # the run came to its end before its moment
            break
        _append(case.out / "kills.jsonl", record)
        say(
            f"  kill {number + 1}: {record['victim']} in {record['moment']} after update {record['updates']}, "
            f"{record['lost']} lost{', inside a save' if record['inside_save'] else ''}, gone in {record['seconds']} s"
        )
    _finish(case, case.run.path)
    twin = case.out / "undisturbed" / case.name
    if RunFolder(twin).read_status().get("state") != "finished":
        _finish(case, twin)
    different = differences(*(list_checkpoints(path / "checkpoints")[-1] for path in (case.run.path, twin)))
    if history(case.run.path) != history(twin):
        different.append("metrics.jsonl")
    updates = int(case.run.read_status()["update"])
    result = {"case": case.name, "processes": case.processes, "seed": case.seed, "updates": updates, "different": different}
    _append(case.out / "cases.jsonl", result | {"damaged": len(list(case.run.checkpoints.glob("damaged-*")))})
    say(f"  end: {'bit-identical to the undisturbed run' if not different else 'DIFFERENT in ' + ', '.join(different)}")


def _finish(case: Case, run_dir: Path) -> None:
    """Let a run come to its end.

    Raises:
        DrillError: it did not.
    """
    launch = case.start(run_dir)
    try:
        code = launch.wait(PATIENCE_SECONDS * 4)
    finally:
        kill(process_tree(launch))
    if code != 0 or RunFolder(run_dir).read_status().get("state") != "finished":
        raise DrillError(f"{run_dir} ended with code {code} and did not finish: see {run_dir.with_suffix('.log')}")


def _kill_once(case: Case, number: int) -> dict[str, Any] | None:
    """Start the run, kill a part of it at a random moment, and say what that cost; None if it finished before.

    Raises:
        DrillError: the run did not start again, or went on from another update than its newest checkpoint.
    """
    chance = random.Random(f"{case.seed} {case.processes} {number}")
    moment, victim = chance.choice(MOMENTS), chance.choice(VICTIMS[case.processes])
    before = find_newest_valid(case.run.checkpoints)
    log = case.run.path.with_suffix(".log")
    said = log.stat().st_size if log.exists() else 0
    launch = case.start(case.run.path)
    try:
        _wait_for_moment(case, launch, moment, chance)
        tree = parts(launch, processes=case.processes)
        if launch.poll() == 0:
            return None
        chosen = tree[{"rank": "ranks", "worker": "workers"}.get(victim, victim)] or tree["all"]
        kill(chosen if victim == "all" else [chance.choice(chosen)])
        seconds = seconds_until_gone(tree["all"], limit=GONE_SECONDS)
        seconds = None if seconds is None else round(seconds, 2)
        launch.wait()
    finally:
        kill(process_tree(launch))
    output = log.read_text(encoding="utf-8", errors="replace")[said:]
    _check_resumed(case, output, before)
    return {"case": case.name, "number": number, "moment": moment, "victim": victim, "seconds": seconds} | _cost(case)


def _check_resumed(case: Case, output: str, newest: Path | None) -> None:
    """Raise a DrillError where the run did not go on from its newest checkpoint; one that was killed early said nothing."""
    resumed = re.search(r"resumed from \S+: update (\d+)", output)
    trained = "[train]" in output
    if (resumed and (newest is None or int(resumed[1]) != _step(newest))) or (trained and newest and not resumed):
        raise DrillError(f"{case.run.path} went on from {resumed and resumed[0]}, its newest checkpoint was {newest}")
    if refused := re.search(r"^error.*(in use by|holds a run|is damaged|differ from|cannot write).*$", output, re.MULTILINE):
        raise DrillError(f"{case.run.path} did not go on: {refused[0]}")


def _cost(case: Case) -> dict[str, Any]:
    """Return what a kill left behind: updates done, updates lost, whether a save was cut, checkpoints that are damaged."""
    updates = max((int(record["update"]) for record in case.run.read_metrics() if record["kind"] == "train"), default=0)
    newest = find_newest_valid(case.run.checkpoints)
    kept = _step(newest) if newest else 0
    damaged = sum(not _is_valid(path) for path in list_checkpoints(case.run.checkpoints))
    inside = any(case.run.checkpoints.glob(".tmp-step-*")) or any(case.run.checkpoints.glob(".old-step-*"))
    return {"updates": updates, "lost": max(updates - kept, 0), "inside_save": inside, "damaged": damaged}


def _is_valid(path: Path) -> bool:
    try:
        verify_checkpoint(path)
    except CheckpointError:
        return False
    return True


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _wait_for_moment(case: Case, launch: subprocess.Popen[str], moment: str, chance: random.Random) -> None:
    """Return when it is time to kill, or when the run has ended.

    Raises:
        DrillError: the moment did not come.
    """
    if moment == "start":
        pause, due = chance.uniform(0, 8 * case.processes), lambda: True
    elif moment == "update":
        seen = len(case.run.read_metrics())
        pause, due = chance.uniform(0, 1.5), lambda: len(case.run.read_metrics()) > seen + 1
    else:
        old, wanted, saves = set(case.run.checkpoints.glob(".tmp-step-*")), chance.randint(1, 4), set[Path]()

        def due() -> bool:
            saves.update(set(case.run.checkpoints.glob(".tmp-step-*")) - old)
            return len(saves) >= wanted

        pause = chance.uniform(0, 0.01)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not due():
        if launch.poll() is not None:
            return
        if time.monotonic() > deadline:
            raise DrillError(f"{case.run.path} did not come to the moment to kill it: {moment}")
        time.sleep(0.0005 if moment == "checkpoint" else 0.02)
    until = time.monotonic() + pause
    while time.monotonic() < until and launch.poll() is None:
        time.sleep(min(0.05, max(until - time.monotonic(), 0)))


def run_fault_tests(out: Path) -> Path:
    """Run every test that injects a fault of the matrix, slow ones too, and return the JUnit XML with what they recorded."""
    out.mkdir(parents=True, exist_ok=True)
    report = (out / "fault_tests.xml").resolve()
    options = ["-m", "fault", "-o", "addopts=-ra --strict-markers", "-p", "no:cacheprovider", f"--junitxml={report}"]
    subprocess.run([sys.executable, "-m", "pytest", *options], cwd=ROOT, check=False)
    if not report.exists():
        raise DrillError("pytest left no report")
    return report
