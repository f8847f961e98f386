"""What a drill found, as figures and tables: kills and cases from its folder, fault tests from their JUnit XML."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from taylorvit.run_folder import replace_file
from taylorvit.studies.fault_drill import read_records
from taylorvit.studies.results import markdown_table

# Columns of the table of fault tests; whatever else the tests recorded stands in its last one.
FIGURES = ("updates lost, most", "bytes corrupted", "inputs tried", "messages given")


@dataclass(frozen=True)
class FaultTest:
    """A test that injects faults.

    Args:
        name: file and test.
        rows: of the fault matrix that it stands for.
        missed: why it did not pass, failure or skip, in one line; empty if it passed.
        figures: what it counted.
    """

    name: str
    rows: tuple[str, ...]
    missed: str
    figures: dict[str, int]

    @property
    def faults(self) -> int:
        """How many faults it injects, of which a bad input is one: those that it counted, or one."""
        return max(self.figures.get("faults injected", 0), self.figures.get("inputs tried", 0), 1)


@dataclass(frozen=True)
class Results:
    """A drill's records, and the fault tests, none where they were not run."""

    kills: list[dict[str, Any]]
    cases: list[dict[str, Any]]
    tests: list[FaultTest]

    @property
    def passed(self) -> bool:
        """Whether every end is the undisturbed one, nothing is damaged or left over, and every fault test passed."""
        ends = all(not case["different"] and not case["damaged"] for case in self.cases)
        clean = all(not kill["damaged"] and kill["seconds"] is not None for kill in self.kills)
        return ends and clean and not any(test.missed for test in self.tests)


def read_results(out: Path) -> Results:
    """Read a drill's folder."""
    report = out / "fault_tests.xml"
    tests = read_tests(report.read_text(encoding="utf-8")) if report.exists() else []
    return Results(read_records(out / "kills.jsonl"), read_records(out / "cases.jsonl"), tests)


def read_tests(xml: str) -> list[FaultTest]:
    """Return the tests of a JUnit XML that have `fault` properties, with what they counted."""
    tests = []
    for case in ElementTree.fromstring(xml).iter("testcase"):
        properties = [(item.get("name", ""), item.get("value", "")) for item in case.iter("property")]
        rows = tuple(value for name, value in properties if name == "fault")
        if rows:
            marks = [mark for kind in ("failure", "error", "skipped") for mark in case.iter(kind)]
            missed = "; ".join(f"{mark.tag}: {mark.get('message', '')}".splitlines()[0] for mark in marks)
            figures = {name: int(value) for name, value in properties if name != "fault"}
            tests.append(FaultTest(f"{case.get('classname')}::{case.get('name')}", rows, missed, figures))
    return tests


def count_rows(tests: Sequence[FaultTest]) -> dict[str, dict[str, int]]:
    """Add up the tests of every row, in order, and of `all`; a figure that ends in `, most` is a maximum.

    A test that stands for several rows counts in each of them, and once in `all`.
    """
    names = sorted({row for test in tests for row in test.rows}, key=lambda row: (row[0], int(row[1:])))
    return {row: _add_up([test for test in tests if row in test.rows]) for row in names} | {"all": _add_up(tests)}


def _add_up(tests: Sequence[FaultTest]) -> dict[str, int]:
    passed = [test for test in tests if not test.missed]
    total = {
        "tests": len(tests),
        "passed": len(passed),
        "faults injected": sum(test.faults for test in tests),
        "survived": sum(test.faults for test in passed),
    }
    for name in sorted({name for test in tests for name in test.figures} - total.keys()):
        values = [test.figures[name] for test in tests if name in test.figures]
        total[name] = max(values) if name.endswith(", most") else sum(values)
    return total


def write_files(results: Results, header: Mapping[str, Any], out: Path) -> str:
    """Write fault_drill.json and fault_drill.md into the folder and return the latter's text."""
    content = {
        **header,
        "kills": results.kills,
        "cases": results.cases,
        "rows": count_rows(results.tests),
        "tests": [asdict(test) for test in results.tests],
    }
    replace_file(out / "fault_drill.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    text = markdown(results)
    replace_file(out / "fault_drill.md", text)
    return text


def markdown(results: Results) -> str:
    """Return all tables."""
    parts = []
    if results.kills:
        parts += ["## Kills", kill_table(results), "## Victims", victim_table(results.kills)]
    if results.tests:
        parts += ["## Fault tests", row_table(results.tests)]
        parts += [f"- {test.name}: {test.missed}" for test in results.tests if test.missed]
    return "\n\n".join(parts) + "\n"


def row_table(tests: Sequence[FaultTest]) -> str:
    """Return the figures of the fault tests by row of the matrix, and of all."""
    columns = ("tests", "passed", "faults injected", "survived", *FIGURES)
    lines = []
    for row, total in count_rows(tests).items():
        others = "; ".join(f"{name}: {value:,}" for name, value in total.items() if name not in columns)
        lines.append([row, *(f"{total[name]:,}" if name in total else "" for name in columns), others])
    return markdown_table(("row", *columns, "other figures"), lines)


def kill_table(results: Results) -> str:
    """Return the figures of the kills, by number of processes and together."""
    groups = {f"{count} process(es)": count for count in sorted({_processes(kill) for kill in results.kills})}
    header = ["", *groups, "all"]
    columns = [
        _figures_of(
            [kill for kill in results.kills if _processes(kill) == count],
            [case for case in results.cases if case["processes"] == count],
        )
        for count in groups.values()
    ]
    columns.append(_figures_of(results.kills, results.cases))
    return markdown_table(header, [[name, *(column[name] for column in columns)] for name in columns[0]])


def _figures_of(kills: list[dict[str, Any]], cases: list[dict[str, Any]]) -> dict[str, str]:
    lost = [kill["lost"] for kill in kills]
    seconds = [kill["seconds"] for kill in kills if kill["seconds"] is not None]
    return {
        "kills": str(len(kills)),
        "aimed at a checkpoint": str(sum(kill["moment"] == "checkpoint" for kill in kills)),
        "that cut a checkpoint being written": str(sum(kill["inside_save"] for kill in kills)),
        "updates lost, most": str(max(lost, default=0)),
        "updates lost, mean": f"{sum(lost) / max(len(lost), 1):.2f}",
        "damaged checkpoints": str(sum(kill["damaged"] for kill in kills)),
        "seconds until all processes were gone, most": f"{max(seconds, default=0):.1f}",
        "kills that left a process behind": str(len(kills) - len(seconds)),
        "runs ended": str(len(cases)),
        "ends bit-identical to the undisturbed run": str(sum(not case["different"] for case in cases)),
    }


def victim_table(kills: list[dict[str, Any]]) -> str:
    """Return how many kills each victim had, what they cost, and how long the rest of the run lived."""
    lines = []
    for victim in sorted({kill["victim"] for kill in kills}):
        mine = [kill for kill in kills if kill["victim"] == victim]
        seconds = [kill["seconds"] for kill in mine if kill["seconds"] is not None]
        lost = [kill["lost"] for kill in mine]
        lines.append([victim, str(len(mine)), f"{sum(lost) / len(mine):.2f}", str(max(lost)), f"{max(seconds, default=0):.1f}"])
    return markdown_table(("victim", "kills", "updates lost, mean", "most", "seconds until gone, most"), lines)


def _processes(kill: Mapping[str, Any]) -> int:
    return int(kill["case"].partition("-")[0])
