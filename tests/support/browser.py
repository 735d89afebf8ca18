"""A page in a real browser: what it shows, what it complains about, and what it asks the network for."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MISSING = f"no browser on PATH: none of {', '.join(NAMES)}"

# Without the errands of the browser itself; and no name is ever resolved, so that a page that asks gets nothing.
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)


@dataclass(frozen=True)
class Opened:
    """What became of a page.

    Args:
        dom: the document as the browser holds it after loading, serialised.
        console: messages on the console.
        requests: addresses that the page asked for, other than its own.
    """

    dom: str
    console: tuple[str, ...]
    requests: tuple[str, ...]


def find() -> str | None:
    """The browser's program, or None."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


def open_page(page: Path, work: Path, *, width: int = 1400) -> Opened:
    """Open a file in the browser that :func:`find` found.

    Args:
        page: the file.
        work: an empty folder for the browser's own files.
        width: of its window, in pixels.
    """
    log = work / "net.json"
    command = [
        str(find()),
        *QUIET,
        f"--user-data-dir={work / 'profile'}",
        f"--log-net-log={log}",
        f"--window-size={width},900",
    ]
    # The console goes to stderr; virtual time runs until the page has nothing left to do.
    command += ["--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    if done.returncode:
        raise RuntimeError(f"the browser failed with {done.returncode}: {done.stderr[-2000:]}")
    console = re.findall(r"CONSOLE[^\]]*\] (.*)", done.stderr)
    return Opened(done.stdout, tuple(console), requests_in(log, page.as_uri()))


def requests_in(log: Path, own: str) -> tuple[str, ...]:
    """Addresses in a log of Chromium's network that a page asked for, not the browser for itself."""
    found = [event.get("params", {}) for event in json.loads(log.read_text(encoding="utf-8"))["events"]]
    # What no page started has no origin; the page itself is opened by the browser.
    asked = {p["url"] for p in found if "url" in p and p.get("initiator", "not an origin") != "not an origin"}
    return tuple(sorted(asked - {own}))
