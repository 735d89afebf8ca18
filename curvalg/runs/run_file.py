"""The file of a run: its place tried before anything is computed, held by one run at a time, replaced in one piece."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TypeVar

from curvalg.distributed.group import Group, active
from curvalg.errors import CheckpointError

try:
    import fcntl

    def _lock(file: IO[str]) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _unlock(file: IO[str]) -> None:
        # Workers of a loader inherit the open file, and would hold it for as long as they live.
        fcntl.flock(file, fcntl.LOCK_UN)

except ImportError:  # Windows
    import msvcrt

    def _lock(file: IO[str]) -> None:
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]

    def _unlock(file: IO[str]) -> None:
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)  # type: ignore[attr-defined]


T = TypeVar("T")
FileName = str | os.PathLike[str]
"""The name of a file that a run is written to."""
Stamp = tuple[int, int, int] | None
"""What identifies a file in its place, so that another one there is noticed; None where there is none."""


class RunFile:
    """A file that a run writes whole, again and again.

    Symbolic links are followed once, so that what they point to is replaced and they stay. While a run holds the place, there
    is a locked file ``.NAME.lock`` beside it; the system forgets the lock when its process ends, however it ends, so that one
    which is left behind hinders nobody. Where the file system has no locks, another writer is noticed by what it wrote.

    Args:
        path: of the file, in a folder that exists.

    Raises:
        CheckpointError: no file can be written there, or another run holds it.
    """

    def __init__(self, path: FileName) -> None:
        self.given = os.fsdecode(path)
        try:
            self.path = Path(os.path.realpath(self.given))
        except (OSError, ValueError) as error:  # a name with a zero byte
            raise self._refused(str(error)) from error
        self._require_kind()
        self._seen = self._stamp()
        try:
            self._release(self._own())
        except OSError as error:
            raise self._refused(f"a file cannot be written beside it ({error})") from error

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A context in which no other run writes there.

        Raises:
            CheckpointError: another run holds it.
        """
        try:
            file = self._own()
        except OSError:  # it was tried; if it has gone away since, writing will say so
            file = None
        try:
            self._seen = self._stamp()
            yield
        finally:
            if file is not None:
                self._release(file)

    def exists(self) -> bool:
        """Whether there is a file yet."""
        return self.path.exists()

    def replace(self, write: Callable[[Path], object]) -> None:
        """Put a new file in place, so that there is at any moment either the old one or the new one, whole.

        Args:
            write: makes a file of the given name.

        Raises:
            OSError: it could not be written, or another program wrote there meanwhile; what is there stays as it is.
        """
        temporary = self._beside("tmp")  # one name for all writes, so that killed ones do not pile up
        try:
            write(temporary)
            flush(temporary)
            if self._stamp() not in (None, self._seen):
                raise OSError("another program wrote to it meanwhile")
            os.replace(temporary, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        self._seen = self._stamp()
        with contextlib.suppress(OSError):  # some file systems cannot flush a folder
            flush(self.path.parent)

    def _require_kind(self) -> None:
        if not self.path.parent.is_dir():
            raise CheckpointError(
                f"expected a file name in an existing folder, got {self.given}; make {self.path.parent}"
            )
        try:
            mode = self.path.stat().st_mode
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise self._refused(f"it cannot be looked at ({error})") from error
        if stat.S_ISDIR(mode):
            raise CheckpointError(f"expected a file name, but {self.given} is a folder; name a file in it")
        if not stat.S_ISREG(mode):
            raise self._refused("it is a pipe, a device or the like")
        if not os.access(self.path, os.R_OK | os.W_OK):
            raise self._refused("it must not be read and written by this user")

    def _own(self) -> IO[str]:
        """The locked file beside it."""
        beside = self._beside("lock")
        while True:
            file = open(beside, "a+", encoding="utf-8")  # noqa: SIM115  open for as long as the place is held
            try:
                _lock(file)
            except (BlockingIOError, PermissionError) as error:
                owner = _content(file)
                raise CheckpointError(
                    f"expected a file that no other run writes, but {self.given} is held by {owner or 'another run'}; wait for "
                    "it, end it, or name another file"
                ) from error
            except OSError:
                return file  # no locks on this file system
            if _same(file, beside):
                break
            file.close()  # its owner removed it between the two lines above
        file.truncate(0)
        file.write(f"process {os.getpid()} of {socket.gethostname()}")
        file.flush()
        return file

    def _release(self, file: IO[str]) -> None:
        # Removed before it is let go, so that nobody else holds a file that is removed.
        with contextlib.suppress(OSError):
            self._beside("lock").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            _unlock(file)
        file.close()

    def _beside(self, kind: str) -> Path:
        return self.path.with_name(f".{self.path.name}.{kind}")

    def _stamp(self) -> Stamp:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns

    def _refused(self, reason: str) -> CheckpointError:
        return CheckpointError(f"expected a file that can be written, but {self.given!r}: {reason}; name another file")


def require_place(path: FileName | None) -> None:
    """Raise, before anything is computed, for a place where no file can be written; None is none.

    Raises:
        CheckpointError: it is one, or another run writes there.
    """
    if path is not None:
        group = active().vectors
        agreed(group, lambda: RunFile(path) if group.rank == 0 else None)


def agreed(group: Group, own: Callable[[], T]) -> T:
    """What this process makes of files; where one process cannot, all raise the same.

    Args:
        group: all processes, which call this together.
        own: what this one does.

    Raises:
        CheckpointError: one cannot.
    """
    if group.alone:
        return own()
    made: list[T] = []
    failure: CheckpointError | None = None
    try:
        made.append(own())
    except CheckpointError as error:
        failure = error
    said = [text for text in group.objects(None if failure is None else str(failure)) if text is not None]
    if said:
        raise CheckpointError(said[0]) from failure
    return made[0]


def _same(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _content(file: IO[str]) -> str:
    with contextlib.closing(file), contextlib.suppress(OSError, ValueError):  # Windows lets nobody read what is locked
        file.seek(0)
        return file.read(200)
    return ""


def flush(path: Path) -> None:
    """Have the system write a file or folder to its disk.

    Raises:
        OSError: it could not.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
