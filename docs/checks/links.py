"""Fails where a local link of the built documentation leads nowhere: ``python docs/checks/links.py docs/_build/html``."""

from __future__ import annotations

import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    """The links of a page, and the anchors that it offers."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value is None:
                continue
            if name in ("href", "src"):
                self.links.append(value)
            elif name == "id" or (name == "name" and tag == "a"):
                self.anchors.add(value)


@cache
def _read(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def dead(built: Path) -> list[str]:
    """A line for every local link to a file or an anchor that is not there."""
    found: list[str] = []
    for path in sorted(built.rglob("*.html")):
        for link in _read(path).links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or not (parts.path or parts.fragment):
                continue
            target = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
            if target.is_dir():
                target = target / "index.html"
            where = f"{path.relative_to(built)}: {link}"
            if not target.exists():
                found.append(f"{where}: there is no such file")
            elif parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in _read(target).anchors:
                found.append(f"{where}: there is no such anchor")
    return found


def main(built: Path) -> int:
    """Print the dead links; the exit status."""
    found, pages = dead(built), len(list(built.rglob("*.html")))
    if not pages:
        found = [f"{built}: no pages at all"]
    print(*found, f"{pages} pages, {len(found)} dead links", sep="\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
