"""What a drill found, as figures and tables: kills and cases from its folder, fault tests from their JUnit XML."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from taylorvit.run_folder import replace_file
from taylorvit.studies.fault_drill import read_records
from taylorvit.studies.results import markdown_table


@dataclass
class RowCount:
    """The tests of one row of the fault matrix: how many, how many passed, and the sums of the figures they recorded."""

    tests: int = 0
    passed: int = 0
    figures: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Results:
    """A drill's records, and the fault tests by row, empty where they were not run."""

    kills: list[dict[str, Any]]
    cases: list[dict[str, Any]]
    rows: dict[str, RowCount]

    @property
    def passed(self) -> bool:
        """Whether every end is the undisturbed one, nothing is damaged or left over, and every fault test passed."""
        ends = all(not case["different"] and not case["damaged"] for case in self.cases)
        clean = all(not kill["damaged"] and kill["seconds"] is not None for kill in self.kills)
        return ends and clean and all(row.tests == row.passed for row in self.rows.values())


def read_results(out: Path) -> Results:
    """Read a drill's folder."""
    report = out / "fault_tests.xml"
    rows = count_rows(report.read_text(encoding="utf-8")) if report.exists() else {}
    return Results(read_records(out / "kills.jsonl"), read_records(out / "cases.jsonl"), rows)


def count_rows(xml: str) -> dict[str, RowCount]:
    """Count the tests of a JUnit XML by the rows that their `fault` properties name; a skipped test counts as not passed."""
    rows: dict[str, RowCount] = {}
    for test in ElementTree.fromstring(xml).iter("testcase"):
        properties = [(item.get("name", ""), item.get("value", "")) for item in test.iter("property")]
        failed = any(test.find(kind) is not None for kind in ("failure", "error", "skipped"))
        for row in (rows.setdefault(value, RowCount()) for name, value in properties if name == "fault"):
            row.tests += 1
            row.passed += not failed
            row.figures.update({name: int(float(value)) for name, value in properties if name != "fault" and _is_number(value)})
    return dict(sorted(rows.items(), key=lambda item: (item[0][0], int(item[0][1:]) if item[0][1:].isdigit() else 0)))


def write_files(results: Results, header: Mapping[str, Any], out: Path) -> str:
    """Write fault_drill.json and fault_drill.md into the folder and return the latter's text."""
    rows = {
        name: {"tests": row.tests, "passed": row.passed, "figures": dict(row.figures)} for name, row in results.rows.items()
    }
    content = {**header, "kills": results.kills, "cases": results.cases, "rows": rows}
    replace_file(out / "fault_drill.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    text = markdown(results)
    replace_file(out / "fault_drill.md", text)
    return text


def markdown(results: Results) -> str:
    """Return all tables."""
    parts = []
    if results.kills:
        parts += ["## Kills", kill_table(results), "## Victims", victim_table(results.kills)]
    if results.rows:
        lines = [[name, str(row.tests), str(row.passed), _figures(row)] for name, row in results.rows.items()]
        parts += ["## Fault tests", markdown_table(("row", "tests", "passed", "recorded"), lines)]
    return "\n\n".join(parts) + "\n"


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


def _figures(row: RowCount) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(row.figures.items()))


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True
