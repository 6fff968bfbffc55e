"""How much memory there is, and how much a forward took at its worst.

Knows no model.
"""

import contextlib
import ctypes
import os
from pathlib import Path

import torch

# glibc's mallopt(3): parameter numbers.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_CGROUP = Path("/sys/fs/cgroup")
_SELF = Path("/proc/self")


def is_out_of_memory(error: Exception) -> bool:
    """Whether that is what an allocator said: of a CPU's torch makes no type of its own."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "memory" in str(error).lower()


def cpu_count() -> int:
    """Processors that this process may really use: its affinity, cut by the cgroup's quota."""
    count = len(os.sched_getaffinity(0))
    quota = _read(_CGROUP / "cpu.max").split()
    if len(quota) == 2 and quota[0] != "max":
        count = min(count, max(1, round(int(quota[0]) / int(quota[1]))))
    return count


def keep_freed_memory() -> None:
    """Have malloc keep what a step frees for the next step.

    By default glibc gives large buffers back to the kernel at once, and every step pays again for the page faults of
    getting them: half the time of a decoding step with 64 rows. To be called when a model is loaded, which frees more
    and larger buffers than any step. Does nothing under another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def give_back_freed_memory() -> None:
    """Have malloc give what is free now back to the kernel, whatever it was told to keep.

    Loading frees a copy of every weight that is laid out anew, which leaves holes that no step would fill again, and
    that would hide as much of what a step takes from whoever measures it. Does nothing under another C library.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def available_bytes(device: torch.device, fraction: float = 1.0) -> int:
    """Bytes that may still be allocated: on a CPU what the cgroup and the machine leave, on a GPU what is free.

    Args:
        fraction: the part of a GPU's whole memory that may be used.
    """
    if device.type != "cpu":
        free, total = torch.cuda.mem_get_info(device)
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + reusable - (1 - fraction) * total)
    return min(_machine_available(), _cgroup_available())


def anonymous_bytes() -> int:
    """What this process holds of the machine's memory now, without files that the kernel can drop."""
    return _status_bytes("RssAnon")


def used_bytes(device: torch.device) -> int:
    """What this process holds of a device's memory now."""
    return anonymous_bytes() if device.type == "cpu" else torch.cuda.memory_allocated(device)


class PeakMeter:
    """The most memory that was in use since `start`, above what was in use then."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0

    def start(self) -> None:
        """Begin a measurement."""
        if self._device.type != "cpu":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
            return
        # The kernel forgets its high-water mark on this write (proc(5)); where it may not be written, the old
        # mark stays and the measurement errs on the large side.
        with contextlib.suppress(OSError):
            (_SELF / "clear_refs").write_text("5")
        self._before = _status_bytes("VmRSS")

    def peak_bytes(self) -> int:
        """Bytes above the start, so far."""
        if self._device.type != "cpu":
            torch.cuda.synchronize(self._device)
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return max(0, _status_bytes("VmHWM") - self._before)


def _machine_available() -> int:
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_available() -> int:
    """Version 2 first, then version 1; no limit counts as endless."""
    for limit_file, used_file, stat_key in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, used = _read(_CGROUP / limit_file), _read(_CGROUP / used_file)
        if limit.isdigit() and used.isdigit():
            stat = _read((_CGROUP / used_file).with_name("memory.stat"))
            fields = dict(line.split()[:2] for line in stat.splitlines() if " " in line)
            # Page cache that the kernel gives back before it kills anybody.
            return int(limit) - int(used) + int(fields.get(stat_key, 0))
    return 1 << 62


def _status_bytes(key: str) -> int:
    for line in _read(_SELF / "status").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
