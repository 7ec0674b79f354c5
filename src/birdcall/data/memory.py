"""Say how much memory is left: the machine's, or less where a control group has a limit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class _Names(NamedTuple):
    """A control group's files; ``reclaimable``: pages that the kernel gives back, of used ones."""

    limit: str
    used: str
    reclaimable: str


_VERSION_1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = _Names("memory.max", "memory.current", "inactive_file")


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that can still be taken, None where the system does not say.

    That is the least of the kernel's MemAvailable and of what the limits of the process's control
    groups (a container's, a batch job's; version 1 or 2) leave. ``root``: where ``/proc`` and
    ``/sys`` are.
    """
    found = [*_machine_memory(root / "proc/meminfo"), *_group_memory(root)]
    return max(0, min(found)) if found else None


def _machine_memory(path: Path) -> Iterator[int]:
    for line in _read_lines(path):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _group_memory(root: Path) -> Iterator[int]:
    """Yield what the limit of each group leaves that the process is in, up to the outermost."""
    for line in _read_lines(root / "proc/self/cgroup"):
        number, controllers, name = line.split(":", 2)
        if number == "0" and not controllers:
            mount, names = root / "sys/fs/cgroup", _VERSION_2
        elif "memory" in controllers.split(","):
            mount, names = root / "sys/fs/cgroup/memory", _VERSION_1
        else:
            continue
        # In a container the name may be the host's, and only the mount itself be there.
        group = mount / name.strip().lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(mount):
                yield from _left_in(folder, names)


def _left_in(folder: Path, names: _Names) -> Iterator[int]:
    limit, used = (next(iter(_read_lines(folder / name)), "max") for name in names[:2])
    if "max" in (limit, used):
        return
    pairs = (line.split() for line in _read_lines(folder / "memory.stat"))
    reclaimable = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
    yield int(limit) - int(used) + reclaimable.get(names.reclaimable, 0)


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:  # another system, or a group that is not shown here
        return []
