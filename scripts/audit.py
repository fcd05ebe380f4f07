"""Ask a database of vulnerabilities, with pip-audit, about every version of constraints.txt.

Nothing is installed, and no package index is asked. Without pip-audit or a network the audit is
skipped, in one line. A finding is an error unless ACCEPTED gives the reason why it may stay.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OSV = "https://api.osv.dev/v1/query"
SECONDS = 10  # to wait for an answer

# From a finding's identifier to the reason why it does not concern this repository.
ACCEPTED: dict[str, str] = {}


def pins(text: str) -> list[list[str]]:
    """The `name==version` lines of constraints, without markers, in files of one version a name."""
    files: list[dict[str, str]] = []
    for line in text.splitlines():
        pin = line.split("#")[0].split(";")[0].strip()
        if not pin:
            continue
        name = pin.split("==")[0].lower()
        known = next((file for file in files if name not in file), None)
        if known is None:
            known = {}
            files.append(known)
        known[name] = pin
    return [list(file.values()) for file in files]


def unreachable(url: str) -> str | None:
    """Why the database cannot be asked; None: it answers."""
    try:
        urllib.request.urlopen(url, timeout=SECONDS).close()
    except urllib.error.HTTPError:  # an answer, if only that it wants another request
        return None
    except OSError as error:
        return str(getattr(error, "reason", error))
    return None


def findings(requirements: list[str], url: str) -> list[dict[str, Any]]:
    """Each vulnerable package with its version and vulnerabilities, as pip-audit prints them.

    Raises:
        RuntimeError: pip-audit failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "requirements.txt"
        file.write_text("\n".join(requirements) + "\n")
        command = [sys.executable, "-m", "pip_audit", "--requirement", str(file)]
        command += ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
        command += ["--vulnerability-service", "osv", "--osv-url", url, "--timeout", str(SECONDS)]
        run = subprocess.run(command, capture_output=True, text=True)
    try:
        packages = json.loads(run.stdout)["dependencies"]
    except (ValueError, KeyError):
        lines = run.stderr.strip().splitlines() or [f"exit status {run.returncode}"]
        raise RuntimeError(lines[-1]) from None
    missing = [p["name"] for p in packages if "skip_reason" in p]
    if missing or len(packages) < len(requirements):
        raise RuntimeError(f"{len(requirements)} packages asked for, skipped: {missing}")
    return [package for package in packages if package["vulns"]]


def audit(constraints: Path, url: str) -> int:
    """Print what is found, and return the exit status."""
    if find_spec("pip_audit") is None:
        print("audit: skipped, pip-audit is not installed")
        return 0
    reason = unreachable(url)
    if reason is not None:
        print(f"audit: skipped, {url} cannot be reached: {reason}")
        return 0
    files, failed, seen = pins(constraints.read_text("utf-8")), 0, set()
    for file in files:
        try:
            packages = findings(file, url)
        except RuntimeError as error:
            print(f"audit: pip-audit failed: {error}")
            return 1
        for package in packages:
            for vulnerability in package["vulns"]:
                names = {vulnerability["id"], *vulnerability.get("aliases", ())}
                pin = f"{package['name']}=={package['version']}"
                accepted = next((name for name in names if name in ACCEPTED), None)
                if accepted is not None:
                    seen.add(accepted)
                    print(f"audit: {pin}: {accepted}, accepted: {ACCEPTED[accepted]}")
                    continue
                failed = 1
                fixed = ", ".join(vulnerability.get("fix_versions", ())) or "no version yet"
                print(f"audit: {pin}: {', '.join(sorted(names))}; mended in {fixed}")
    for name in ACCEPTED.keys() - seen:
        print(f"audit: {name} is in ACCEPTED and was not found: remove it")
        failed = 1
    print(f"audit: {sum(map(len, files))} versions, {'findings' if failed else 'no findings'}")
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--constraints", type=Path, default=ROOT / "constraints.txt")
    parser.add_argument("--osv-url", default=OSV)
    options = parser.parse_args()
    sys.exit(audit(options.constraints, options.osv_url))


if __name__ == "__main__":
    main()
