"""One writer at a time: a lock of the operating system's, and who holds it."""
import os
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


class Held(TimeoutError):
    """Another process holds the lock; `holder` is its number, as text."""

    def __init__(self, path: Path, holder: str) -> None:
        super().__init__(f"{path} is held by process {holder}")
        self.holder = holder


@contextmanager
def hold(path: Path, seconds: float = 0.0):
    """Hold the lock file `path`, waiting for it up to `seconds` (-1: for ever); Held if it is not free by then.

    The lock ends with its process, however that ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(path), path.with_suffix(".pid")
    try:
        lock.acquire(timeout=seconds, poll_interval=0.2)
    except Timeout:
        raise Held(path, owner.read_text() if owner.exists() else "?") from None
    try:
        owner.write_text(str(os.getpid()))
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()
