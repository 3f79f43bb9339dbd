"""A control group with a memory limit, for contestants that must really have no more; page cache counts in it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


class MemoryLimit:
    """`with MemoryLimit(bytes) as limit:` run `limit.prefixed(command)`. Needs a control group that may be written to."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        one = (ROOT / "memory").is_dir()
        self.group = (ROOT / "memory" if one else ROOT) / f"moesaic-{os.getpid()}"
        self._file = "memory.limit_in_bytes" if one else "memory.max"
        self._peak = "memory.max_usage_in_bytes" if one else "memory.peak"

    @staticmethod
    def unavailable() -> str | None:
        """Why there is no limit on this machine; None where there is."""
        try:
            with MemoryLimit(1 << 30):
                return None
        except OSError as error:
            return f"memory not limited: {error}"

    def prefixed(self, command: Sequence[str]) -> list[str]:
        """The command, begun inside the group."""
        return ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(self.group), *command]

    @property
    def peak_bytes(self) -> int | None:
        """The most that the group held, page cache included; None where the kernel does not count it."""
        try:
            return int((self.group / self._peak).read_text())
        except (OSError, ValueError):
            return None

    def __enter__(self) -> MemoryLimit:
        self.group.mkdir(exist_ok=True)
        try:
            (self.group / self._file).write_text(str(self.nbytes))
            swap = self.group / ("memory.memsw.limit_in_bytes" if self._file != "memory.max" else "memory.swap.max")
            with suppress(OSError):  # a kernel without swap accounting
                swap.write_text(str(self.nbytes if self._file != "memory.max" else 0))
        except OSError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            self.group.rmdir()


def drop_page_cache(files: Sequence[Path]) -> None:
    """Make the kernel forget what it holds of these files."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
