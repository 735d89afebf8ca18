"""Places of files, tried before anything is computed."""

from __future__ import annotations

from pathlib import Path

from curvalg.errors import ProblemError


def require_writable(path: Path, what: str, flag: str) -> None:
    """Raise for a place where no file can be made; an existing file stays as it is.

    Args:
        path: of the file.
        what: it is, in words.
        flag: that named it.

    Raises:
        ProblemError: no file can be made there.
    """
    existed = path.exists()
    try:
        # Opening is the only test that folders, permissions and full or read-only disks all answer to.
        with path.open("ab"):
            pass
    except OSError as error:
        raise ProblemError(
            f"{what} cannot be written to {path}: {error.strerror or error}; give {flag} another place"
        ) from error
    if not existed:
        path.unlink()
