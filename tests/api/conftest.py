"""The routes over the real engine, the real bridge and a device that answers what it is told to say."""

import json
import time
from pathlib import Path

import gevent
import pytest
import tokenizers
from fakes import FakeRunner
from flask.testing import FlaskClient
from tokenizers import decoders, models, pre_tokenizers, processors

from serving.api.app import create_app
from serving.api.identity import Identity
from serving.bridge import Bridge, State
from serving.engine.engine import Engine
from serving.grammar.grammars import Grammars
from serving.plan import StepPlan
from serving.protocol import Origin, SamplingParams, StepStats
from serving.settings import Settings
from serving.telemetry.journal import Journal
from serving.telemetry.metrics import Metrics
from serving.tokenizer import Tokenizer
from serving.validation.chat_template import ChatTemplate
from serving.validation.parameters import Limits
from serving.validation.validator import Validator
from serving.weights.model_files import ModelFiles
from serving.wsgi import load_adapters, named_adapters

BOS, EOS = 256, 257
UNKNOWN_TO_MODEL = 258
TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """One token for each byte, then `<s>` (added to prompts), `</s>` and a token that the model has no row for."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<beyond>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"})


TOKENIZER = byte_tokenizer()


def spoken(prompt: list[int]) -> list[int]:
    """What the device says: what stands in the line behind the last `say:` of the prompt, else " world".

    There `␤` is a line's end.
    """
    text = TOKENIZER.decode(prompt)
    said = text.rpartition("say:")[2].partition("\n")[0] if "say:" in text else " world"
    return TOKENIZER.encode(said.replace("␤", "\n"), add_special_tokens=False)


def signed(ids: list[int], directory: str) -> list[int]:
    """What an adapter makes of an answer: its directory's name stands before it."""
    return TOKENIZER.encode(f"{Path(directory).name}:", add_special_tokens=False) + ids


class Server:
    """An application with everything behind it.

    Attributes:
        client: calls it.
        steps: the numbers of every step so far.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        permits: int = 8,
        template: str | None = TEMPLATE,
        pipeline_tag: str | None = None,
        prefill_logprobs: bool = True,
        keep_alive_s: float = 15.0,
        max_rows: int = 16,
        model_id: str = "demo/model",
        max_total_tokens: int = 64,
        grammars: bool = False,
        start_gate=None,
        journal: Journal | None = None,
        **runner,
    ) -> None:
        runner = {"vocab_size": UNKNOWN_TO_MODEL, "reply": spoken, "adapted": signed, "eos_token_id": EOS, **runner}
        self.runner = FakeRunner(**runner)
        self.metrics = Metrics()
        self.adapters = named_adapters(settings)
        files = ModelFiles(directory="", adapters={named.name: named.place for named in settings.adapters})
        limits = Limits(
            max_best_of=settings.max_best_of,
            max_stop_sequences=settings.max_stop_sequences,
            max_top_n_tokens=settings.max_top_n_tokens,
            max_input_tokens=max_total_tokens - 1,
            max_total_tokens=max_total_tokens,
            max_client_batch_size=settings.max_client_batch_size,
        )
        self.metrics.model_loaded(
            max_input_tokens=max_total_tokens - 1, max_total_tokens=max_total_tokens, block_size=4
        )

        def start():
            if start_gate is not None:
                start_gate.wait()
            engine = Engine(
                self.runner, TOKENIZER, eos_token_ids=frozenset({EOS}), max_step_tokens=256, max_rows=max_rows,
                max_adapters=settings.adapter_room,
            )  # fmt: skip
            load_adapters(engine, files, self.adapters)
            validator = Validator(
                tokenizer=TOKENIZER,
                chat_template=None if template is None else ChatTemplate(template, {"bos_token": "<s>"}),
                limits=limits,
                facts=self.runner.facts,
                prefill_logprobs=prefill_logprobs,
                grammars=Grammars(TOKENIZER.to_json(), vocab_size=UNKNOWN_TO_MODEL, eos_token_ids=[EOS])
                if grammars
                else None,
                origin=Origin(pipeline_tag=pipeline_tag),
                adapters=self.adapters,
            )
            return engine, lambda: self.start_runner_again(), validator

        def start_runner_again():
            self.runner = FakeRunner(**runner)
            return self.runner

        self.start_runner_again = start_runner_again

        self.steps: list[StepStats] = []

        def on_step(stats: StepStats) -> None:
            self.steps.append(stats)
            self.metrics.step(stats)

        self.bridge = Bridge(
            start, permits=permits, keep_alive_s=keep_alive_s, on_step=on_step, on_adapter_lost=self.adapters.lose
        )
        self.app = create_app(
            bridge=self.bridge,
            settings=settings,
            metrics=self.metrics,
            identity=Identity(model_id=model_id, version="1.2.3"),
            adapters=self.adapters,
            journal=journal,
        )
        self.client: FlaskClient = self.app.test_client()

    def wait(self, state: State = State.READY) -> "Server":
        limit = time.monotonic() + 20
        while self.bridge.state is not state:
            assert time.monotonic() < limit, f"still {self.bridge.state}: {self.bridge.failure}"
            gevent.sleep(0.002)
        return self

    def started(self) -> list[tuple[str, SamplingParams]]:
        """The prompts that the device starts from now on, and how their tokens shall be chosen."""
        prompts: list[tuple[str, SamplingParams]] = []
        submit = self.runner.submit

        def watched(plan: StepPlan) -> None:
            prompts.extend((TOKENIZER.decode(new.token_ids[: new.prompt_length]), new.sampling) for new in plan.started)
            submit(plan)

        self.runner.submit = watched
        return prompts

    def metric(self, line: str) -> str | None:
        """The value of a series."""
        for sample in self.metrics.render().decode().splitlines():
            name, _, value = sample.rpartition(" ")
            if name == line:
                return value
        return None


@pytest.fixture
def serve():
    """A function that makes a server; all of them end with the test."""
    servers = []

    def make(*, cors=(), ready=True, max_best_of=3, said=None, **options) -> Server:
        own = {name: options.pop(name) for name in ("api_key", "payload_limit") if name in options}
        settings = Settings(cors_allow_origin=cors, max_best_of=max_best_of, **own, **(said or {}))
        server = Server(settings=settings, **options)
        servers.append(server)
        return server.wait() if ready else server

    yield make
    for server in servers:
        server.bridge.close()


@pytest.fixture(scope="module")
def serve_module():
    """A function that makes a server for requests without lasting effects; all of them end with the module."""
    servers = []

    def make(**options) -> Server:
        servers.append(Server(settings=Settings(max_best_of=3), **options))
        return servers[-1].wait()

    yield make
    for server in servers:
        server.bridge.close()


@pytest.fixture(scope="module")
def server():
    """A server that only requests without lasting effects may use."""
    server = Server(settings=Settings(max_best_of=3)).wait()
    yield server
    server.bridge.close()


@pytest.fixture
def client(server) -> FlaskClient:
    return server.client


@pytest.fixture
def events():
    """A function that parses a stream's events; it fails on anything that is no event."""

    def parse(response) -> list[dict | str]:
        assert response.content_type == "text/event-stream"
        body = response.get_data().decode()
        assert body.endswith("\n\n")
        frames = body.removesuffix("\n\n").split("\n\n")
        assert all(frame.startswith("data: ") for frame in frames), frames
        payloads = [frame.removeprefix("data: ") for frame in frames]
        return [payload if payload == "[DONE]" else json.loads(payload) for payload in payloads]

    return parse
