"""The supervisor of fastpref/bench/runner.py: a worker that crashes or hangs costs only the part
that it was at."""

from __future__ import annotations

import sys
import time

import pytest

from fastpref.bench.runner import Supervisor

WORKER = """
import json, os, sys, time
request = json.loads(sys.stdin.readline())
def say(**m): print(json.dumps(m), flush=True)
if request["fault"] == "start": sys.exit("no luck")
if request["first"]: say(machine={"name": "m"})
print("not a message", flush=True)
for task in request["tasks"]:
    say(doing=task["id"])
    for entry in ("good", "bad"):
        if entry in task["excluded"]: continue
        say(doing=task["id"], entry=entry)
        if entry == "bad" and task["id"] in request["faulty"]:
            if request["fault"] == "exit": os._exit(3)
            if request["fault"] == "hang": time.sleep(60)
            if request["fault"] == "lost":
                say(lost="a sticky error"); sys.exit(1)
    if request["fault"] == "task" and task["id"] in request["faulty"]:
        say(doing=task["id"]); sys.exit("out of luck")
    say(result={"id": task["id"], "excluded": task["excluded"]})
say(done=True)
"""


def _supervise(tmp_path, fault, faulty=("2",), patience=30.0, seconds=60.0):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    request = {
        "tasks": [{"id": name} for name in "123"],
        "deadline": time.time() + seconds,
        "fault": fault,
        "faulty": list(faulty),
    }
    heard = []
    s = Supervisor(
        [sys.executable, str(script)], request, hear=heard.append, patience=patience, grace=0.0
    )
    s.run()
    results = [m["result"] for m in heard if "result" in m]
    assert results == s.results
    return s, {r["id"]: r for r in results}, heard


@pytest.mark.parametrize("fault", ["exit", "hang", "lost"])
def test_a_part_that_stops_the_worker(tmp_path, fault):
    s, results, heard = _supervise(tmp_path, fault, patience=4.0 if fault == "hang" else 60.0)
    assert list(results) == ["1", "2", "3"] and not s.dropped
    why = results["2"]["excluded"]["bad"]
    text = {"exit": "status 3", "hang": "nothing heard for 4 s", "lost": "a sticky error"}[fault]
    assert text in why and len(s.stops) == 1 and s.stops[0].startswith("2: bad: ")
    assert not results["3"]["excluded"]
    assert [m for m in heard if "machine" in m] == [{"machine": {"name": "m"}}]


def test_a_part_that_stops_it_twice_is_left_out_of_the_rest(tmp_path):
    s, results, _ = _supervise(tmp_path, "exit", faulty="123")
    assert len(s.stops) == 2 and all("bad" in r["excluded"] for r in results.values())


def test_a_task_that_stops_the_worker(tmp_path):
    s, results, _ = _supervise(tmp_path, "task")
    assert "out of luck" in results["2"]["failed"] and "failed" not in results["3"]


def test_a_worker_that_cannot_start(tmp_path):
    s, results, _ = _supervise(tmp_path, "start")
    assert not results and s.dropped == ["1", "2", "3"]
    assert len(s.stops) == 1 and "no luck" in s.stops[0]


def test_the_time_is_up(tmp_path):
    s, results, _ = _supervise(tmp_path, "hang", seconds=5.0)
    assert s.stops == ["2: bad: the time was up"] and s.dropped == ["2", "3"]
