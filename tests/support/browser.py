"""A headless Chromium for tests of pages, where one is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")


def find() -> str | None:
    """The path of a Chromium: of the variable CHROMIUM, of PATH, or playwright's; else None."""
    if chosen := os.environ.get("CHROMIUM"):
        return chosen
    for name in NAMES:
        if path := shutil.which(name):
            return path
    folder = Path(
        os.environ.get("PLAYWRIGHT_BROWSERS_PATH", Path.home() / ".cache" / "ms-playwright")
    )
    found = sorted(folder.glob("chromium*/*/*headless*shell")) + sorted(
        folder.glob("chromium-*/*/chrome")
    )
    return str(found[-1]) if found else None


def _run(browser: str, page: Path, folder: Path, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-dev-shm-usage", "--enable-logging=stderr", "--hide-scrollbars",
            f"--user-data-dir={folder / 'chromium'}", *options, page.resolve().as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip


def rendered(browser: str, page: Path, folder: Path) -> tuple[str, list[str]]:
    """The document of a page after it was loaded, and what its console said."""
    done = _run(browser, page, folder, "--dump-dom")
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def screenshot(browser: str, page: Path, folder: Path, size: str = "1100,1600") -> bytes:
    """A picture of a page as the contents of a PNG file."""
    target = folder / "screenshot.png"
    done = _run(browser, page, folder, f"--screenshot={target}", f"--window-size={size}")
    assert done.returncode == 0, done.stderr
    return target.read_bytes()
