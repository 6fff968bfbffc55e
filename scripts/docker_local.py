"""Runs the image as SageMaker would, asks it everything that matters, stops it, and prints one table.

It must not know the server's insides; what is asked stands in `scripts/container_checks.py`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a file: its neighbours are found from the repository's root
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts import container_checks as checks
from scripts.emulator.containers import Container, ContainerError, EngineContainer, ProcessContainer, find_engine
from scripts.emulator.instance import ping
from scripts.emulator.limits import Limits

DESCRIPTION = """\
Run the image as SageMaker runs it, and stricter: `serve`, model and root file system read-only, no capabilities. Wait
for /ping, ask it whole and streamed, put the wire contract to it, let unmodified boto3 talk to it through the emulator,
then send SIGTERM while a stream runs. One table at the end, one JSON line for a program, and the exit code: 0 if
nothing failed, 1 if something did, 2 for a wrong command line.

Where no container engine answers, a process of this tree takes the container's place, and the report says so: nothing
about the image is known then.
"""
EPILOG = """\
examples:
  python -m scripts.docker_local                                  # weir:cpu, which is there already, its demo model
  python -m scripts.docker_local --build                          # builds it first
  python -m scripts.docker_local --model ./my-model --network none
  python -m scripts.docker_local --conformance 'http.*'           # only these rows of the contract
  python -m scripts.docker_local --build -- --build-arg BASE_IMAGE=mine   # what follows goes to the build
"""
ROOT = Path(__file__).resolve().parents[1]
HARDENED = ("--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges")
BAD_USAGE = 2
NO_CONTAINER = """\
******************************************************************************
  NOT IN A CONTAINER: a process of this tree takes its place.
  The image is NOT tested: {why}.
******************************************************************************"""
NO_ENGINE = "no container engine answers; start Docker or Podman for that"


@dataclass(frozen=True, slots=True)
class Outcome:
    """A row of the report. `outcome` is `ok`, `FAIL` or `skip`."""

    check: str
    outcome: str
    seconds: float
    seen: str


class Report:
    """Runs checks one after the other and keeps what came of them."""

    def __init__(self) -> None:
        self.rows: list[Outcome] = []

    def run(self, name: str, check: Callable[[], str]) -> bool:
        """Whether it held."""
        print(f"==> {name}", file=sys.stderr, flush=True)
        begun = time.monotonic()
        try:
            outcome, seen = "ok", check()
        except (checks.CheckFailed, ContainerError, OSError, KeyError, IndexError, ValueError) as error:
            expected = isinstance(error, (checks.CheckFailed, ContainerError))
            outcome, seen = "FAIL", str(error) if expected else f"{type(error).__name__}: {error}"
        self.rows.append(Outcome(name, outcome, round(time.monotonic() - begun, 1), seen))
        return outcome == "ok"

    def skip(self, name: str, why: str) -> None:
        """A check that was not asked for, or cannot be made."""
        self.rows.append(Outcome(name, "skip", 0.0, why))

    @property
    def failed(self) -> bool:
        """Whether any check did not hold."""
        return any(row.outcome == "FAIL" for row in self.rows)

    def show(self, subject: str) -> None:
        """The table, and then one line of JSON."""
        print(f"\n{subject}\n")
        width = max(len(row.check) for row in self.rows)
        for row in self.rows:
            print(f"{row.check:{width}}  {row.outcome:4}  {row.seconds:6.1f} s  {row.seen}")
        print(json.dumps({"subject": subject, "failed": self.failed, "checks": [asdict(row) for row in self.rows]}))


def main(argv: Sequence[str]) -> int:
    """Run everything. Returns the exit code."""
    place = list(argv).index("--") if "--" in argv else len(argv)
    options = _parser().parse_args(argv[:place])
    model: Path | None = options.model
    if model is not None and not model.is_dir():
        print(f"Error: --model {model} is no directory", file=sys.stderr)
        return BAD_USAGE
    engine = find_engine() if options.backend != "process" else None
    if engine is None and options.backend == "engine":
        print("Error: no container engine answers; start Docker or Podman", file=sys.stderr)
        return BAD_USAGE
    report = Report()
    if engine is None:
        why = NO_ENGINE if options.backend == "auto" else "--backend process was given"
        print(NO_CONTAINER.format(why=why), file=sys.stderr, flush=True)
        report.skip("image", f"NOT TESTED: {why}")
        subject = "a process of this tree in a container's place"
    else:
        subject = f"{options.image}, run by {engine}"
        if options.build and not report.run("build", lambda: build(engine, options.image, argv[place + 1 :])):
            report.show(subject)
            return 1
    log: list[str] = []
    container = make_container(engine, options, log.append)
    try:
        _check(report, container, options)
    finally:
        container.stop(Limits().stop_s)
    report.show(subject)
    if report.failed:
        print("\nThe container's last lines:", *log[-20:], sep="\n  ", file=sys.stderr)
    return 1 if report.failed else 0


def _check(report: Report, container: Container, options: argparse.Namespace) -> None:
    limits = Limits(startup_s=options.startup_timeout)
    if not report.run("start and /ping", lambda: _start(container, limits)):
        return
    report.run("process 1", lambda: checks.first_process(container))
    report.run("whole answer", lambda: checks.whole(container))
    report.run("streamed answer", lambda: checks.streamed(container))
    if options.conformance == ["none"]:
        report.skip("wire contract", "not asked for")
    else:
        report.run("wire contract", lambda: checks.conformance(container, options.conformance))
    with tempfile.TemporaryDirectory(prefix="emulator-s3-") as storage:
        report.run("boto3, emulator", lambda: checks.through_boto3(container, Path(storage)))
    report.run("SIGTERM", lambda: checks.drain(container, limits.stop_s))


def _start(container: Container, limits: Limits) -> str:
    container.start()
    begun = time.monotonic()
    while (reason := ping(container.address, limits)) is not None:
        if not container.running():
            raise checks.CheckFailed("it ended before it was ready")
        if time.monotonic() - begun > limits.startup_s:
            raise checks.CheckFailed(f"/ping was not healthy within {limits.startup_s:g} s ({reason})")
        time.sleep(0.2)
    return f"ready after {time.monotonic() - begun:.1f} s"


def make_container(engine: str | None, options: argparse.Namespace, log: Callable[[str], None]) -> Container:
    """What is asked: a container of the engine, or without one a process."""
    environment = dict(value.partition("=")[::2] for value in options.env)
    if engine is None:
        return ProcessContainer([sys.executable, "-m", "serving"], environment, options.model, log)
    return EngineContainer(
        engine,
        options.image,
        environment=environment,
        model=options.model,
        adapters={},
        options=[*HARDENED, *options.engine_option],
        network=options.network,
        bind_to_port=None,
        log=log,
    )


def build(engine: str, image: str, options: Sequence[str]) -> str:
    """`scripts/build_image.sh` for the kind that the image's tag names; then its size. Raises CheckFailed."""
    kind = image.partition(":")[2]
    command = ["scripts/build_image.sh", kind, *options]
    if subprocess.run(command, cwd=ROOT, env=dict(os.environ), stdout=sys.stderr, check=False).returncode:
        raise checks.CheckFailed(f"{' '.join(command)} failed")
    asked = [engine, "image", "inspect", "--format={{.Size}}", image]
    size = int(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)
    return f"{size / 1e9:.2f} GB"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "docker_local",
        usage="%(prog)s [options] [-- BUILD OPTIONS ...]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--image", default="weir:cpu", help="to run (%(default)s)")
    parser.add_argument("--build", action="store_true", help="build it first: weir:cpu, weir:cuda or weir:rocm")
    parser.add_argument("--model", type=Path, metavar="DIR", help="mounted read-only at /opt/ml/model (the demo model)")
    parser.add_argument("--network", metavar="NAME", help="'none' takes the network away")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="repeatable")
    parser.add_argument("--engine-option", action="append", default=[], metavar="OPTION", help="of `run`; repeatable")
    parser.add_argument(
        "--backend", choices=("auto", "engine", "process"), default="auto", help="what runs it (%(default)s)"
    )
    parser.add_argument(
        "--conformance",
        action="append",
        default=[],
        metavar="PATTERN",
        help="only these rows; 'none' for none; repeatable",
    )
    parser.add_argument(
        "--startup-timeout", type=float, default=Limits().startup_s, metavar="SECONDS", help="for /ping (%(default)g)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
