"""Whether a container left the model directory as it found it: SageMaker mounts /opt/ml/model read-only.

Knows no container.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

SHOWN = 3


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Names, sizes and times of everything in a directory."""

    directory: Path
    entries: dict[str, tuple[int, int]]

    @classmethod
    def take(cls, directory: Path) -> Self:
        """Look at it now."""
        return cls(directory, _entries(directory))

    def changes(self) -> str | None:
        """What is not as it was, in words; None if all is."""
        now = _entries(self.directory)
        different = sorted(name for name in now.keys() | self.entries.keys() if now.get(name) != self.entries.get(name))
        if not different:
            return None
        more = "" if len(different) <= SHOWN else f" and {len(different) - SHOWN} more"
        return f"{', '.join(different[:SHOWN])}{more}"


def _entries(directory: Path) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for path in directory.rglob("*"):
        about = path.lstat()
        found[str(path.relative_to(directory))] = (0, 0) if path.is_dir() else (about.st_size, about.st_mtime_ns)
    return found
