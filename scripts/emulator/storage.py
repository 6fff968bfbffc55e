"""A directory in the place of S3: s3://bucket/key is DIRECTORY/bucket/key, and file:///path is itself.

Knows nothing of what is stored.
"""

from pathlib import Path
from urllib.parse import unquote, urlsplit


class StorageError(Exception):
    """A location that cannot be read or written, and why."""


class Storage:
    """The objects below a directory.

    Args:
        root: of the buckets; made when first written to.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()

    def path_of(self, location: str) -> Path:
        """Where an object lies. Raises StorageError for another scheme, no key, or a way out of the directory."""
        parts = urlsplit(location)
        if parts.scheme == "file":
            return Path(unquote(parts.path))
        if parts.scheme != "s3" or not parts.netloc or not parts.path.strip("/"):
            raise StorageError(f"{location} is neither s3://bucket/key nor file:///path")
        path = (self._root / parts.netloc / parts.path.lstrip("/")).resolve()
        if self._root not in path.parents:
            raise StorageError(f"{location} leads out of {self._root}")
        return path

    def read(self, location: str) -> bytes:
        """An object. Raises StorageError."""
        path = self.path_of(location)
        try:
            return path.read_bytes()
        except OSError as error:
            raise StorageError(f"{location} cannot be read ({path}: {error.strerror})") from error

    def write(self, location: str, data: bytes) -> None:
        """Store an object: it is whole as soon as it is there. Raises StorageError."""
        path = self.path_of(location)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.part")
            part.write_bytes(data)
            part.replace(path)
        except OSError as error:
            raise StorageError(f"{location} cannot be written ({path}: {error.strerror})") from error
