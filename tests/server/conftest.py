"""A real server: `python -m serving` in a process of its own, with a tiny model of random weights."""

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import requests
import safetensors.torch
import torch
from fakes import byte_tokenizer
from hub_server import HubServer

TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "torch_dtype": "float32",
}
TOKENIZER_CONFIG = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "chat_template": "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}",
}
SMALL = (
    "--hostname=127.0.0.1",
    "--port=0",
    "--device=cpu",
    "--kv-cache-memory=16MiB",
    "--max-batch-prefill-tokens=256",
    "--max-batch-size=8",
)
ROOT = Path(__file__).parents[2]


class Server:
    """A running server, its log and its processes.

    Args:
        program: what Python runs.

    Attributes:
        lines: what it has logged so far.
        url: where it listens, once `wait_listening` has returned.
    """

    def __init__(
        self, arguments: list[str], environ: dict[str, str], program: tuple[str, ...] = ("-m", "serving")
    ) -> None:
        clean = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        self.process = subprocess.Popen(
            [sys.executable, *program, *arguments],
            cwd=ROOT,
            env={**clean, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self.url = ""
        self._fresh: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._fresh.put(line.rstrip("\n"))
        self._fresh.put(None)

    def wait_line(self, pattern: str, seconds: float = 60) -> re.Match[str]:
        """The first new line that matches. Fails when the log ends or time is up."""
        limit = time.monotonic() + seconds
        while (left := limit - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                line = self._fresh.get(timeout=left)
                if line is None:
                    break
                self.lines.append(line)
                if match := re.search(pattern, line):
                    return match
        raise AssertionError(f"{pattern!r} was not logged:\n" + "\n".join(self.lines))

    def wait_listening(self) -> "Server":
        self.url = self.wait_line(r"Listening at (http://[\w.:\[\]]+)")[1]
        return self

    def wait_ready(self) -> "Server":
        self.wait_listening()
        self.wait_line(r"\bReady\b")
        return self

    def wait_exit(self, seconds: float = 30) -> int:
        code = self.process.wait(seconds)
        self._reader.join()
        while (line := self._fresh.get()) is not None:
            self.lines.append(line)
        return code

    def remaining_lines(self) -> list[str]:
        """Everything that it has logged; once it is stopped."""
        with contextlib.suppress(queue.Empty):
            while (line := self._fresh.get_nowait()) is not None:
                self.lines.append(line)
        return self.lines

    def get(self, path: str, **options) -> requests.Response:
        return requests.get(self.url + path, timeout=30, **options)

    def post(self, path: str, body: object, **options) -> requests.Response:
        return requests.post(self.url + path, json=body, timeout=60, **options)

    def processes(self) -> list[psutil.Process]:
        """The arbiter, its worker, the worker's device process, and then those in which grammars are tried."""
        arbiter = psutil.Process(self.process.pid)
        return [arbiter, *sorted(arbiter.children(recursive=True), key=_tries_grammars)]

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def stop(self) -> None:
        """End it and everything that it started, whatever state it is in."""
        family = self.processes() if self.process.poll() is None else []
        if family:
            self.signal(signal.SIGINT)
            _, alive = psutil.wait_procs(family, timeout=10)
            for process in alive:
                process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


def _tries_grammars(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return "serving.grammar.process" in process.cmdline()
    return False


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory) -> Path:
    """A model that loads in no time: one token a byte, random weights that are far from ties."""
    directory = tmp_path_factory.mktemp("model")
    (directory / "config.json").write_text(json.dumps(TINY))
    (directory / "tokenizer.json").write_text(byte_tokenizer()._backend.to_str())
    (directory / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    safetensors.torch.save_file(random_weights(), directory / "model.safetensors")
    return directory


def random_weights() -> dict[str, torch.Tensor]:
    """The tensors of `TINY`, under their names in a checkpoint."""
    draw = torch.Generator().manual_seed(0)
    hidden, inner, vocabulary, head = TINY["hidden_size"], TINY["intermediate_size"], TINY["vocab_size"], 16
    matrices = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (head, hidden),
        "self_attn.v_proj": (head, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes = {"model.embed_tokens": (vocabulary, hidden), "model.norm": (hidden,)}
    for layer in range(TINY["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.{norm}": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{prefix}.{name}": shape for name, shape in matrices.items()}
    return {f"{name}.weight": torch.empty(shape).normal_(0, 0.5, generator=draw) for name, shape in shapes.items()}


@pytest.fixture
def start(model_directory) -> Iterator[Callable[..., Server]]:
    """Start servers with the small model and these flags, or with a `plain` command line; they end with the test."""
    servers: list[Server] = []

    def start(*flags: str, plain: list[str] | None = None, environ: dict[str, str] | None = None) -> Server:
        arguments = plain or [f"--model-id={model_directory}", *SMALL, *flags]
        servers.append(Server(arguments, environ or {}))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def hub(model_directory) -> Iterator[HubServer]:
    """A hub that has the small model as `org/tiny`."""
    hub = HubServer()
    hub.add("org/tiny", {path.name: path.read_bytes() for path in model_directory.iterdir()})
    yield hub
    hub.stop()


@pytest.fixture(scope="module")
def server(model_directory) -> Iterator[Server]:
    """One server for the tests of a module that leave it as they found it."""
    server = Server([f"--model-id={model_directory}", *SMALL], {})
    try:
        yield server.wait_ready()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def demo_server() -> Iterator[Server]:
    """One server of the demo model for the tests of a module that leave it as they found it."""
    server = Server(list(SMALL), {})
    try:
        yield server.wait_ready()
    finally:
        server.stop()
