"""The drill: a kill is survived and counted, an interrupted drill continues, and its report counts what was found."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from taylorvit.studies import fault_drill
from taylorvit.studies.fault_drill import Case, DrillError, _check_resumed, read_records, run_drill
from taylorvit.studies.fault_drill_report import Results, markdown, read_results, read_tests, row_table
from taylorvit.studies.fault_runs import seconds_until_gone, start_run

XML = """<testsuites><testsuite>
<testcase classname="x" name="a"><properties><property name="fault" value="A10"/><property name="updates lost, most" value="4"/>
<property name="faults injected" value="15"/></properties></testcase>
<testcase classname="x" name="b"><properties><property name="fault" value="A10"/><property name="fault" value="A2"/>
<property name="updates lost, most" value="2"/><property name="bytes corrupted" value="1000"/></properties></testcase>
<testcase classname="x" name="c"><properties><property name="fault" value="A2"/><property name="messages given" value="2"/>
<property name="bytes corrupted" value="234"/></properties><failure message="x&#10;y"/></testcase>
<testcase classname="x" name="d"><properties><property name="fault" value="B1"/></properties>
<skipped message="not root"/></testcase>
<testcase classname="x" name="f"><properties><property name="fault" value="C1"/><property name="inputs tried" value="3"/>
<property name="updates lost, most" value="0"/><property name="seconds, most" value="9"/></properties></testcase>
<testcase classname="x" name="e"/>
</testsuite></testsuites>"""


def kill_record(**changes: Any) -> dict[str, Any]:
    plain = {"case": "1-0", "victim": "all", "moment": "update", "lost": 2, "inside_save": False, "damaged": 0, "seconds": 0.1}
    return plain | changes


def test_fault_tests_are_counted_by_row_in_order_and_once_in_all() -> None:
    tests = read_tests(XML)
    assert [row.split("|")[1:-1] for row in row_table(tests).replace(" ", "").splitlines()[2:]] == [
        ["A2", "2", "1", "2", "1", "2", "1,234", "", "2", ""],
        ["A10", "2", "2", "16", "16", "4", "1,000", "", "", ""],
        ["B1", "1", "0", "1", "0", "", "", "", "", ""],
        ["C1", "1", "1", "3", "3", "0", "", "3", "", "seconds,most:9"],
        ["all", "5", "3", "21", "19", "4", "1,234", "3", "2", "seconds,most:9"],
    ]
    assert not Results([], [], tests).passed
    assert Results([], [], [tests[0]]).passed
    text = markdown(Results([], [], tests))
    assert "- x::c: failure: x\n" in text
    assert "- x::d: skipped: not root\n" in text


def test_the_report_adds_up() -> None:
    kills = [kill_record(), kill_record(case="2-0", victim="rank", lost=3, inside_save=True, seconds=4.0)]
    cases = [{"case": "1-0", "processes": 1, "different": [], "damaged": 0}]
    results = Results(kills, cases, [])
    assert results.passed
    text = markdown(results)
    assert "| updates lost, most | 2 | 3 | 3 |" in text
    assert "| updates lost, mean | 2.00 | 3.00 | 2.50 |" in text
    assert "| that cut a checkpoint being written | 0 | 1 | 1 |" in text
    assert "| rank | 1 | 3.00 | 3 | 4.0 |" in text
    for bad in ({"damaged": 1}, {"seconds": None}):
        assert not Results([kill_record(**bad)], cases, []).passed
    assert not Results(kills, [cases[0] | {"different": ["model.weight"]}], []).passed


def test_a_start_that_does_not_go_on_where_it_should_is_noticed(tmp_path: Path) -> None:
    case, newest = Case(tmp_path, 1, 0), tmp_path / "step-00000006"
    _check_resumed(case, "note       resumed from /x/step-00000006: update 6, epoch 0", newest)
    _check_resumed(case, "", newest)  # killed before it could say
    _check_resumed(case, "error: lost process 1 (the checkpoint of update 9)", newest)
    for output in ("resumed from /x/step-00000003: update 3", "[train] epoch 1", "error: run_dir='x' is in use by process 3"):
        with pytest.raises(DrillError):
            _check_resumed(case, output, newest)


def test_what_is_left_of_a_run_is_found_and_ended(tmp_path: Path) -> None:
    program = tmp_path / "sleep.py"
    program.write_text(
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('up', flush=True)\ntime.sleep(60)"
    )
    launch = start_run(program, [])
    assert launch.stdout is not None
    assert launch.stdout.readline() == "up\n"
    launch.terminate()
    assert seconds_until_gone([psutil.Process(launch.pid)], limit=0.2) is None
    assert launch.wait(20) == -signal.SIGKILL
    launch.communicate()


@pytest.mark.fault("A1")
@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_drill_kills_compares_and_continues(
    processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: Counter[str]
) -> None:
    monkeypatch.setattr(fault_drill, "KILLS_PER_CASE", 2)
    monkeypatch.setitem(fault_drill.SETTINGS, "schedule.epochs", 6)
    said: list[str] = []
    run_drill(tmp_path, kills=1, seed=7, processes=[processes], say=said.append)
    run_drill(tmp_path, kills=3, seed=7, processes=[processes], say=said.append)
    results = read_results(tmp_path)
    assert results.passed
    assert len(results.kills) >= 3
    assert len(results.cases) >= 2
    figures["updates lost, most"] = max(kill["lost"] for kill in results.kills)
    assert figures["updates lost, most"] <= fault_drill.SAVE_EVERY
    assert len(read_records(tmp_path / "kills.jsonl")) == len(results.kills)
    figures["faults injected"] = len(results.kills)
