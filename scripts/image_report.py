"""Says what an image weighs and why: its layers, the Python packages in it, and whether it grew past its limit.

It must not know how an image is built; it asks the container engine, and the image's own Python. Standard library only.
"""

import argparse
import json
import subprocess
import sys
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

DESCRIPTION = """\
Print an image's size, its layers with what made them, and the largest Python packages inside. Exit with 1 if it is
larger than its kind may be, 2 if it cannot be read. scripts/build_image.sh ends with this.
"""
# A tenth above what was measured on Debian 12 (docs/building_images.md). A larger base needs a --limit.
LIMITS_GB = {"cpu": 1.6, "cuda": 5.9}
LARGEST = 12  # packages that are shown
WIDTH = 88  # of what made a layer
# Run inside of the image: the bytes of each distribution's files that are there.
PACKAGES = """\
import importlib.metadata, json
sizes = {}
for one in importlib.metadata.distributions():
    paths = [path.locate() for path in one.files or []]
    sizes[one.name] = sum(path.stat().st_size for path in paths if path.is_file())
print(json.dumps(sizes))
"""


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer: its bytes, unpacked, and the instruction that made it."""

    size: int
    made_by: str


@dataclass(frozen=True, slots=True)
class ImageReport:
    """All sizes in bytes. `compressed` is what a registry would keep, where that was asked for."""

    image: str
    size: int
    compressed: int | None
    layers: list[Layer]
    packages: dict[str, int]


def main(argv: Sequence[str]) -> int:
    """Print the report. Returns the exit code."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", help="such as weir:cuda; its kind is the tag's last word")
    parser.add_argument("--engine", default="docker", help="(%(default)s)")
    parser.add_argument("--limit", type=float, metavar="GB", help="the kind's own, else none")
    parser.add_argument("--compressed", action="store_true", help="compress it, too: 40 s for every GB")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write it there as well")
    options = parser.parse_args(argv)
    limit_gb: float | None = options.limit
    if limit_gb is None:
        limit_gb = LIMITS_GB.get(kind_of(options.image))
    try:
        report = measure(options.engine, options.image, compress=options.compressed)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        print(f"image_report: {options.image} cannot be read: {error}", file=sys.stderr)
        return 2
    print(as_text(report))
    if options.json is not None:
        options.json.write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    if limit_gb is not None and report.size > limit_gb * 1e9:
        print(f"TOO LARGE: {report.size / 1e9:.2f} GB, of {limit_gb:g} GB that it may have", file=sys.stderr)
        return 1
    return 0


def kind_of(image: str) -> str:
    """`cuda` of weir:cuda, registry/weir:0123456789ab-cuda and weir:cuda@sha256:0123."""
    tag = image.partition("@")[0].rpartition("/")[2].partition(":")[2]
    return tag.rpartition("-")[2]


def measure(engine: str, image: str, *, compress: bool) -> ImageReport:
    """Asks engine and image. Raises OSError, CalledProcessError and, for what the engine says otherwise, ValueError."""
    size = int(_ask(engine, "image", "inspect", "--format={{.Size}}", image))
    told = ("--no-trunc", "--human=false", "--format={{.Size}} {{json .CreatedBy}}")
    history = _ask(engine, "history", *told, image)
    run = ("run", "--rm", "--network=none", "--entrypoint=/opt/weir/bin/python", image, "-c", PACKAGES)
    packages: dict[str, int] = json.loads(_ask(engine, *run))
    compressed = compressed_size(engine, image) if compress else None
    return ImageReport(image, size, compressed, layers_of(history), packages)


def layers_of(history: str) -> list[Layer]:
    """The layers that hold something, the lowest first, from lines of a size and a quoted instruction."""
    rows = [line.partition(" ") for line in reversed(history.splitlines())]
    return [Layer(int(size), instruction(json.loads(made_by))) for size, _, made_by in rows if int(size)]


def instruction(made_by: str) -> str:
    """What a Dockerfile says, from what the engine makes of it: in one line, without shell, arguments and builder."""
    text = " ".join(made_by.replace("# buildkit", "").split())
    if text.startswith("RUN ") and "/bin/sh -c " in text:
        text = "RUN " + text.partition("/bin/sh -c ")[2]
    return text or "(the base image)"


def compressed_size(engine: str, image: str) -> int:
    """Bytes of the image as one archive, compressed as registries keep layers."""
    deflate, total = zlib.compressobj(6), 0
    with subprocess.Popen([engine, "save", image], stdout=subprocess.PIPE) as saving:
        assert saving.stdout is not None
        while piece := saving.stdout.read(1 << 20):
            total += len(deflate.compress(piece))
    if saving.returncode:
        raise subprocess.CalledProcessError(saving.returncode, saving.args)
    return total + len(deflate.flush())


def as_text(report: ImageReport) -> str:
    """The report for a person."""
    total = _megabytes(report.size)
    rows = [f"{total} {report.image}" + (f", {report.compressed / 1e9:.2f} GB compressed" if report.compressed else "")]
    rows += ["", "Layers, the lowest first:"]
    rows += [f"{_megabytes(layer.size)} {layer.made_by[:WIDTH]}" for layer in report.layers]
    largest = sorted(report.packages.items(), key=lambda item: (-item[1], item[0]))
    shown, others = largest[:LARGEST], largest[LARGEST:]
    rows += ["", "Python packages, the largest first:"]
    rows += [f"{_megabytes(size)} {name}" for name, size in shown]
    if others:
        rows.append(f"{_megabytes(sum(size for _, size in others))} {len(others)} others")
    return "\n".join(rows)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:9.1f} MB"


def _ask(engine: str, *arguments: str) -> str:
    done = subprocess.run([engine, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return done.stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
