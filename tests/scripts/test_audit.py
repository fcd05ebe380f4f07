"""scripts/audit.py: what it asks about, what it refuses, and when it is skipped."""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

import audit  # noqa: E402

CONSTRAINTS = """# comment
one==1.0
two==1.0; python_version < "3.11"
two==2.0; python_version >= "3.11"
"""


@pytest.fixture
def constraints(tmp_path):
    path = tmp_path / "constraints.txt"
    path.write_text(CONSTRAINTS)
    return path


@pytest.fixture
def url():
    """A database that knows of a vulnerability of two==1.0."""

    class Database(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(405)

        def do_POST(self):
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found = {}
            if (query["package"]["name"], query["version"]) == ("two", "1.0"):
                ranges = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "2.0"}]}]
                package = {"name": "two", "ecosystem": "PyPI"}
                affected = [{"package": package, "ranges": ranges, "versions": ["1.0"]}]
                found = {"vulns": [{
                    "id": "PYSEC-1", "aliases": ["CVE-1"], "summary": "bad", "details": "bad",
                    "affected": affected, "modified": "2026-01-01T00:00:00Z",
                }]}  # fmt: skip
            body = json.dumps(found).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Database) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1/query"
        server.shutdown()


def test_every_version_is_asked_about():
    assert audit.pins(CONSTRAINTS) == [["one==1.0", "two==1.0"], ["two==2.0"]]
    text = (SCRIPTS.parent / "constraints.txt").read_text("utf-8")
    lines = [line for line in text.splitlines() if line and line[0] != "#"]
    assert sum(map(len, audit.pins(text))) == len(lines)


def test_without_pip_audit_it_is_skipped(constraints, monkeypatch, capsys):
    monkeypatch.setattr(audit, "find_spec", lambda name: None)
    assert audit.audit(constraints, "http://127.0.0.1:1") == 0
    assert capsys.readouterr().out == "audit: skipped, pip-audit is not installed\n"


def test_without_a_network_it_is_skipped(constraints, monkeypatch, capsys):
    monkeypatch.setattr(audit, "find_spec", lambda name: name)
    assert audit.audit(constraints, "http://127.0.0.1:1/v1/query") == 0
    said = capsys.readouterr().out
    assert "skipped, http://127.0.0.1:1/v1/query cannot be reached" in said
    assert said.count("\n") == 1


def test_a_finding_fails_unless_it_is_accepted(constraints, url, monkeypatch, capsys):
    pytest.importorskip("pip_audit")
    assert audit.audit(constraints, url) == 1
    assert "two==1.0: CVE-1, PYSEC-1; mended in 2.0" in capsys.readouterr().out
    monkeypatch.setattr(audit, "ACCEPTED", {"CVE-1": "we never call it"})
    assert audit.audit(constraints, url) == 0
    assert "two==1.0: CVE-1, accepted: we never call it" in capsys.readouterr().out
    monkeypatch.setattr(audit, "ACCEPTED", {"CVE-1": "we never call it", "CVE-2": "gone"})
    assert audit.audit(constraints, url) == 1
    assert "CVE-2 is in ACCEPTED and was not found" in capsys.readouterr().out


def test_a_tool_that_fails_is_no_pass(constraints, url, monkeypatch, capsys):
    monkeypatch.setattr(audit, "find_spec", lambda name: name)
    monkeypatch.setattr(audit.sys, "executable", "false")
    assert audit.audit(constraints, url) == 1
    assert "pip-audit failed: exit status 1" in capsys.readouterr().out
