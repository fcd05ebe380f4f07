"""The page of docs/reliability.md, from what the tests of tests/faults wrote at whole length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Part = dict[str, Any]


def _kills(parts: dict[str, Part]) -> str:
    found = [part for name, part in parts.items() if name.startswith("kills")]
    phases: dict[str, int] = {}
    for part in found:
        for phase, count in part["phases"].items():
            phases[phase] = phases.get(phase, 0) + count
    names = {"between": "between these", "save": "saving", "rotate": "rotating"}
    names |= {"train": "training", "evaluate": "evaluating", "precompute": "precomputing"}
    where = ", ".join(f"{count} {names[name]}" for name, count in sorted(phases.items()))
    counts = [part["kills"] for part in found]
    return (
        f"{sum(counts)} runs killed, {counts[0]} of one process and {counts[1]} of two "
        f"({where}): every run ended with the losses and weights of an undisturbed one"
    )


def _disk(parts: dict[str, Part]) -> str:
    found = [part for name, part in parts.items() if name.startswith("disk")]
    calls, harmless, states = (
        sum(part[key] for part in found) for key in ("calls", "harmless", "states")
    )
    return (
        f"{calls} failing calls: {calls - harmless} were one sentence and exit status 4, "
        f"{harmless} cost nothing; the checkpoint before was there each time, and the run went on "
        f"from each of the {states} states that were left"
    )


def _cases(parts: dict[str, Part]) -> str:
    part = parts["cases"]
    ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in part["error_over_eager"].items())
    return f"{part['cases']} cases, no fault; root mean square error over eager torch's: {ratios}"


def _fuzzing(parts: dict[str, Part]) -> str:
    part = parts["fuzzing"]
    return (
        f"{part['inputs']} inputs in {part['seconds']} s by {part['by']}, {part['corpus']} of "
        f"which reached new code: {part['crashes']} crashes"
    )


def _bad_input(parts: dict[str, Part]) -> str:
    return f"{parts['bad input']['kinds']} kinds, each answered by one sentence"


def _sanitizers(parts: dict[str, Part]) -> str:
    names = {"thread": "ThreadSanitizer", "address,undefined": "AddressSanitizer with UBSan"}
    found = {name.split(", ")[1]: part for name, part in parts.items() if "sanitizer" in name}
    return ", ".join(
        f"{names[name]}: {part['reports']} reports with {part['threads']} threads"
        for name, part in found.items()
    )


def _soak(parts: dict[str, Part]) -> str:
    part = parts["soak"]
    return (
        f"{part['steps']} steps: {part['bytes_per_step']} bytes a step after the first "
        f"{part['warm_up']}, from {part['first_mib']} to {part['last_mib']} MiB"
    )


ROWS: dict[str, tuple[str, Callable[[dict[str, Part]], str]]] = {
    "Killed runs": ("test_kills.py", _kills),
    "Failing disks": ("test_failing_disk.py", _disk),
    "Generated cases": ("test_cases.py", _cases),
    "Fuzzed data files": ("test_fuzz.py", _fuzzing),
    "Bad input": ("test_bad_input.py", _bad_input),
    "Sanitizers": ("test_sanitizers.py", _sanitizers),
    "Long runs": ("test_soak.py", _soak),
}


def table(results: dict[str, Any]) -> list[list[str]]:
    """A row for each part: what is tested, the file of tests/faults and what was found."""
    return [[name, f"`{file}`", found(results["parts"])] for name, (file, found) in ROWS.items()]


def machine(results: dict[str, Any]) -> str:
    """One sentence on where the figures are from."""
    here = results["machine"]
    versions = ", ".join(f"{name} {here['packages'][name]}" for name in ("torch", "transformers"))
    commits = sorted({part["commit"][:10] for part in results["parts"].values()})
    return (
        f"Measured on {here['date'][:10]}: {here['cpu']}, {here['cores']} cores, Python "
        f"{here['python']}, {versions}, commit {', '.join(commits)}.\n"
    )
