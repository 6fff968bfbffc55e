"""What runs behind the emulator: a container of an engine, a process in its place, or something already running.

Knows nothing of health, requests or the platform's API; it starts with the word `serve`, and stops in two signals.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol
from urllib.parse import urlsplit

from scripts.emulator.model_directory import Snapshot
from scripts.emulator.relay import Relay
from scripts.emulator.upstream import Address

PORT = 8080
MODEL_DIRECTORY = "/opt/ml/model"
ADAPTER_DIRECTORY = "/opt/ml/adapters"
BIND_LABEL = "com.amazonaws.sagemaker.capabilities.accept-bind-to-port"
KEPT_LINES = 200

Log = Callable[[str], None]


class ContainerError(Exception):
    """It could not be started; one line that says what to do."""


@dataclass(frozen=True, slots=True)
class Stop:
    """How a container ended: seconds from SIGTERM, its exit code, and whether it had to be killed."""

    seconds: float
    exit_code: int | None
    killed: bool

    def __str__(self) -> str:
        end = "had to be killed" if self.killed else f"exit code {self.exit_code}"
        return f"stopped in {self.seconds:.1f} s, {end}"


class Container(Protocol):
    """Anything that an instance can run. `address` is known once `start` has returned."""

    address: Address

    def start(self) -> None:
        """Raises ContainerError."""

    def running(self) -> bool:
        """Whether its first process lives."""

    def first_process(self) -> str:
        """The command line of its process 1, which gets the SIGTERM; empty where it cannot be seen."""

    def log_tail(self) -> list[str]:
        """The last lines that it wrote."""

    def stop(self, grace_s: float) -> Stop | None:
        """SIGTERM, and SIGKILL after so long. None where it is not ours to stop, or has been stopped."""

    def written_to(self) -> str | None:
        """Which files of the model directory it changed, in words."""


class Attached:
    """A server that somebody else started. It can be asked, and neither stopped nor replaced.

    Args:
        url: such as http://127.0.0.1:8080.

    Raises:
        ContainerError: that is no address.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme != "http" or not parts.hostname or parts.path not in ("", "/"):
            raise ContainerError(f"--url {url} is no server: write it like http://127.0.0.1:8080")
        self.address = Address(parts.hostname, parts.port or 80)

    def start(self) -> None:
        """It is."""

    def running(self) -> bool:
        return True

    def first_process(self) -> str:
        return ""

    def log_tail(self) -> list[str]:
        return []

    def stop(self, grace_s: float) -> Stop | None:
        return None

    def written_to(self) -> str | None:
        return None


class ProcessContainer:
    """A process that stands in for a container: the same word, variables and signals; no image, no isolation.

    Args:
        command: without `serve`, which is added.
        environment: its SageMaker variables; the port comes to them, and of ours only what a process cannot do without.
        model: served in the place of /opt/ml/model, by HF_MODEL_ID; looked at before and after.
        log: gets every line that it writes.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], model: Path | None, log: Log) -> None:
        self.address = Address("127.0.0.1", 0)
        self._command = [*command, "serve"]
        self._environment = dict(environment)
        self._model = model
        self._log = _Tail(log)
        self._process: subprocess.Popen[bytes] | None = None
        self._before: Snapshot | None = None

    def start(self) -> None:
        self.address = Address("127.0.0.1", free_port())
        needed = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
        own = {"SAGEMAKER_BIND_TO_PORT": str(self.address.port)}
        if self._model is not None:
            own["HF_MODEL_ID"] = str(self._model)
            self._before = Snapshot.take(self._model)
        try:
            self._process = subprocess.Popen(
                self._command,
                env={**needed, **own, **self._environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # its group is what is killed in the end, as a container is killed whole
            )
        except OSError as error:
            raise ContainerError(f"cannot run {self._command[0]}: {error.strerror}") from error
        assert self._process.stdout is not None
        self._log.follow(self._process.stdout)

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def first_process(self) -> str:
        assert self._process is not None
        return _readable(Path(f"/proc/{self._process.pid}/cmdline").read_text())

    def log_tail(self) -> list[str]:
        return self._log.lines()

    def stop(self, grace_s: float) -> Stop | None:
        process, self._process = self._process, None
        if process is None:
            return None
        begun = time.monotonic()
        process.terminate()
        killed = False
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            killed = True
        seconds = time.monotonic() - begun
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        self._log.finish()
        return Stop(seconds, None if killed else code, killed)

    def written_to(self) -> str | None:
        return self._before.changes() if self._before is not None else None


class EngineContainer:
    """A container of Docker's or Podman's, run as SageMaker does: `serve`, the model read-only, 30 s to stop.

    Args:
        engine: the command, docker or podman.
        image: to run.
        environment: of the container.
        model: mounted read-only at /opt/ml/model.
        adapters: name to directory, mounted read-only below /opt/ml/adapters.
        options: further ones of `docker run`, such as `--gpus all`.
        network: `none` leaves the container nothing but its own loopback address; None is the engine's default.
        bind_to_port: other than 8080, as in an inference pipeline; the image has to carry the label for it.
        log: gets every line that it writes.

    Attributes:
        name: what `docker exec` and `docker logs` take; None before the start.
    """

    def __init__(
        self,
        engine: str,
        image: str,
        *,
        environment: Mapping[str, str],
        model: Path | None,
        adapters: Mapping[str, Path],
        options: Sequence[str],
        network: str | None,
        bind_to_port: int | None,
        log: Log,
    ) -> None:
        self.address = Address("127.0.0.1", 0)
        self.name: str | None = None
        self._engine = engine
        self._image = image
        self._environment = dict(environment)
        self._volumes = {MODEL_DIRECTORY: model} if model is not None else {}
        self._volumes |= {f"{ADAPTER_DIRECTORY}/{name}": path for name, path in adapters.items()}
        self._options = list(options)
        self._network = network
        self._bind_to_port = bind_to_port
        self._log = _Tail(log)
        self._relay: Relay | None = None
        self._follower: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        port = PORT
        environment = dict(self._environment)
        if self._bind_to_port is not None:
            port = self._bind_to_port
            environment["SAGEMAKER_BIND_TO_PORT"] = str(port)
            self._demand_label()
        command = ["run", "--detach", *self._options]
        command += [f"--volume={path.resolve()}:{place}:ro" for place, path in self._volumes.items()]
        command += [f"--env={name}={value}" for name, value in environment.items()]
        command += [f"--network={self._network}"] if self._network else []
        command += [] if self._isolated else [f"--publish=127.0.0.1::{port}"]
        self.name = self.ask(*command, self._image, "serve")[:12]
        if self._isolated:
            self._relay = Relay([self._engine, "exec", "--interactive", self.name], port)
            self.address = self._relay.address
        else:
            host, _, published = self.ask("port", self.name, f"{port}/tcp").splitlines()[0].rpartition(":")
            self.address = Address(host, int(published))
        self._follower = subprocess.Popen(
            [self._engine, "logs", "--follow", self.name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert self._follower.stdout is not None
        self._log.follow(self._follower.stdout)

    @property
    def _isolated(self) -> bool:
        return self._network == "none"

    def running(self) -> bool:
        return self.name is not None and self.inspect("{{.State.Running}}") == "true"

    def first_process(self) -> str:
        assert self.name is not None
        return _readable(self.ask("exec", self.name, "cat", "/proc/1/cmdline"))

    def log_tail(self) -> list[str]:
        return self._log.lines()

    def stop(self, grace_s: float) -> Stop | None:
        if self.name is None:
            return None
        begun = time.monotonic()
        with contextlib.suppress(ContainerError):  # it is gone already
            self.ask("kill", "--signal=TERM", self.name)
        killed = not self._ended_within(grace_s)
        seconds = time.monotonic() - begun
        if killed:
            with contextlib.suppress(ContainerError):
                self.ask("kill", self.name)
            self._ended_within(grace_s)
        code = int(self.inspect("{{.State.ExitCode}}"))
        if self._relay is not None:
            self._relay.close()
        if self._follower is not None:
            self._follower.wait()
        self._log.finish()
        self.ask("rm", "--force", "--volumes", self.name)
        self.name = None
        return Stop(seconds, code, killed)

    def written_to(self) -> str | None:
        return None  # the mount is read-only

    def inspect(self, template: str) -> str:
        """A field of `docker inspect`. Raises ContainerError."""
        assert self.name is not None
        return self.ask("inspect", f"--format={template}", self.name)

    def ask(self, *arguments: str) -> str:
        """What the engine answers. Raises ContainerError with its last line."""
        done = subprocess.run([self._engine, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise ContainerError(f"{self._engine} {arguments[0]}: {said[-1]}")
        return done.stdout.strip()

    def _ended_within(self, seconds: float) -> bool:
        assert self.name is not None
        with subprocess.Popen([self._engine, "wait", self.name], stdout=subprocess.DEVNULL) as waiting:
            try:
                waiting.wait(seconds)
            except subprocess.TimeoutExpired:
                waiting.kill()
                return False
        return True

    def _demand_label(self) -> None:
        label = self.ask("image", "inspect", f'--format={{{{index .Config.Labels "{BIND_LABEL}"}}}}', self._image)
        if label != "true":
            raise ContainerError(
                f"{self._image} does not carry the label {BIND_LABEL}=true: CreateModel refuses it where the port is "
                "not 8080 (inference pipelines, several containers)"
            )


class _Tail:
    """Hands on what a process writes, and keeps the last of it."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._kept: deque[str] = deque(maxlen=KEPT_LINES)
        self._reader: threading.Thread | None = None

    def follow(self, stream: IO[bytes]) -> None:
        self._reader = threading.Thread(target=self._read, args=(stream,), name="log")
        self._reader.start()

    def finish(self) -> None:
        if self._reader is not None:
            self._reader.join()

    def lines(self) -> list[str]:
        return list(self._kept)

    def _read(self, stream: IO[bytes]) -> None:
        with stream:
            for line in stream:
                text = line.decode(errors="replace").rstrip()
                self._kept.append(text)
                self._log(text)


def _readable(command_line: str) -> str:
    return command_line.replace("\0", " ").strip()


def find_engine() -> str | None:
    """The container engine that answers here: docker or podman; None if neither does."""
    for name in ("docker", "podman"):
        if shutil.which(name) and subprocess.run([name, "info"], capture_output=True, check=False).returncode == 0:
            return name
    return None


def free_port() -> int:
    """A port of the loopback address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
