"""The roof: puts the two wings together and gives gunicorn its application.

The only place that knows them all; it decides nothing but the limits that follow from what the device measured.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flask import Flask

from serving import __version__
from serving.api.app import create_app
from serving.api.identity import Identity
from serving.bridge import Bridge
from serving.engine.engine import Engine
from serving.errors import AdapterRefused, ConfigurationError, ModelError
from serving.grammar.grammars import Grammars
from serving.launcher import DEMO_MODEL, DEMO_MODEL_ID
from serving.plan import ModelFacts, Runner
from serving.protocol import Watermark
from serving.runner.frames import RunnerOptions
from serving.runner.remote import RunnerProcess
from serving.settings import Settings, process_environment
from serving.telemetry.journal import Journal, Tracer
from serving.telemetry.metrics import Metrics
from serving.telemetry.tracing import OTLPTracer
from serving.tokenizer import Tokenizer
from serving.validation.adapters import Adapters
from serving.validation.chat_template import ChatTemplate
from serving.validation.parameters import Limits
from serving.validation.validator import Validator
from serving.weights.fetch import fetch
from serving.weights.model_config import ModelConfig
from serving.weights.model_files import ModelFiles


@dataclass(frozen=True, slots=True)
class Application:
    """The WSGI callable, with what the worker needs beside it."""

    app: Flask
    bridge: Bridge[Validator]
    settings: Settings
    journal: Journal

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer one request."""
        return self.app(environ, start_response)


def application() -> Application:
    """What gunicorn calls in the worker. Raises ConfigurationError."""
    return build(Settings.resolve([], process_environment()))


def build(settings: Settings) -> Application:
    """Assemble the server; its model loads in the engine's thread while HTTP is already answered.

    Raises:
        ConfigurationError: no model was chosen.
    """
    if settings.model_id is None:
        raise ConfigurationError("No model was chosen; start the server with `weir` or set MODEL_ID.")
    model_id = settings.model_id
    metrics = Metrics()
    adapters = named_adapters(settings)
    bridge = Bridge(
        lambda: load(fetch(model_id, settings.revision, settings.adapters), settings, metrics, adapters),
        permits=settings.max_concurrent_requests,
        offload_threads=settings.validation_workers,
        on_step=metrics.step,
        on_adapter_lost=adapters.lose,
    )
    identity = Identity(
        model_id=DEMO_MODEL_ID if Path(model_id) == DEMO_MODEL else model_id,
        version=__version__,
        sha=settings.git_sha,
        docker_label=settings.docker_label,
        compute_type=settings.compute_type,
    )
    journal = Journal(tracer_maker(settings))
    app = create_app(
        bridge=bridge, settings=settings, metrics=metrics, identity=identity, adapters=adapters, journal=journal
    )
    return Application(app, bridge, settings, journal)


def tracer_maker(settings: Settings) -> Callable[[], Tracer] | None:
    """What makes the tracer, where traces are wanted."""
    endpoint = settings.otlp_endpoint
    return None if endpoint is None else lambda: OTLPTracer(endpoint, settings.otlp_service_name)


def named_adapters(settings: Settings) -> Adapters:
    """The adapters of `--lora-adapters`. They count as loaded: nobody is answered before they are."""
    adapters = Adapters(settings.adapter_room)
    for named in settings.adapters:
        here = Path(named.place)
        place = os.path.normpath(here.absolute()) if here.is_dir() else named.origin
        adapters.finish(adapters.begin(named.name, place))
    return adapters


def load(
    files: ModelFiles, settings: Settings, metrics: Metrics, adapters: Adapters
) -> tuple[Engine, Callable[[], Runner], Validator]:
    """Load a model: what the bridge runs in the engine's thread, once the model is here.

    Raises:
        ConfigurationError: the model or the settings cannot work.
        RunnerDied: the device process ended while it loaded.
    """
    config = ModelConfig.load(Path(files.directory))
    tokenizer = Tokenizer.load(files.tokenizer_directory)
    config_path = Path(settings.tokenizer_config_path) if settings.tokenizer_config_path else None
    chat_template = None
    for place in (files.tokenizer_directory, Path(files.directory)):  # an adapter's own, or else its base's
        if chat_template is None:
            chat_template = ChatTemplate.load(place, tokenizer, config_path, settings.chat_template)
    eos_token_ids = end_of_sequence_ids(config, tokenizer)
    options = runner_options(files, settings, eos_token_ids)
    grammars = None
    if not settings.disable_grammar_support:
        grammars = Grammars(tokenizer.to_json(), vocab_size=config.vocab_size, eos_token_ids=eos_token_ids)
        grammars.warm()

    def start_runner() -> Runner:
        return RunnerProcess.start(options)

    runner = start_runner()
    try:
        facts = runner.facts
        limits = derive_limits(settings, facts, tokenizer.model_max_length)
        engine = Engine(
            runner,
            tokenizer,
            eos_token_ids=eos_token_ids,
            max_step_tokens=facts.max_step_tokens,
            max_rows=facts.max_rows,
            prefix_caching=settings.prefix_caching,
            lease_share=settings.session_cache_share,
            max_adapters=settings.adapter_room,
        )
        load_adapters(engine, files, adapters)
    except BaseException:
        runner.close()
        raise
    metrics.model_loaded(
        max_input_tokens=limits.max_input_tokens,
        max_total_tokens=limits.max_total_tokens,
        block_size=facts.block_size,
    )
    validator = Validator(
        tokenizer=tokenizer,
        chat_template=chat_template,
        limits=limits,
        facts=facts,
        prefill_logprobs=settings.enable_prefill_logprobs,
        watermark=Watermark(settings.watermark_gamma, settings.watermark_delta),
        grammars=grammars,
        origin=files.origin,
        decoder_start_token_id=config.decoder_start_token_id,
        adapters=adapters,
    )
    return engine, start_runner, validator


def load_adapters(engine: Engine, files: ModelFiles, adapters: Adapters) -> None:
    """Give the device the adapters that the operator named.

    Raises:
        ModelError: it cannot compute with one of them.
        RunnerDied: it ended while it loaded one.
    """
    for adapter in adapters.all():
        try:
            engine.load_adapter(adapter.number, files.adapters[adapter.name])
        except AdapterRefused as error:
            raise ModelError(f"The adapter {adapter.name} cannot be loaded: {error.detail}") from error


def end_of_sequence_ids(config: ModelConfig, tokenizer: Tokenizer) -> frozenset[int]:
    """Every id that ends a text: those of config.json and generation_config.json, and the tokenizer's own."""
    own = tokenizer.eos_token_id
    return config.eos_token_ids | ({own} if own is not None and own < config.vocab_size else set())


def runner_options(files: ModelFiles, settings: Settings, eos_token_ids: Iterable[int] = ()) -> RunnerOptions:
    """What the device process is told of the settings."""
    return RunnerOptions(
        model_dir=files.directory,
        adapter_dir=files.adapter_directory,
        dtype=settings.dtype,
        device=settings.device,
        load_format=settings.load_format,
        trust_remote_code=settings.trust_remote_code,
        max_step_tokens=settings.max_batch_prefill_tokens,
        max_rows=settings.max_batch_size or settings.max_concurrent_requests,
        max_total_tokens=settings.max_total_tokens,
        max_input_tokens=settings.max_input_tokens,
        kv_cache_bytes=settings.kv_cache_memory,
        device_memory_fraction=settings.cuda_memory_fraction,
        grammars=not settings.disable_grammar_support,
        eos_token_ids=sorted(eos_token_ids),
        rank_count=settings.num_shard or 1,
        max_adapters=settings.adapter_room,
        max_adapter_rank=settings.max_lora_rank,
        log_json=settings.json_output,
        log_level=settings.log_level,
    )


def derive_limits(settings: Settings, facts: ModelFacts, model_max_length: int | None) -> Limits:
    """The limits of a request: said, or else what cache, tokenizer and model allow.

    Raises:
        ConfigurationError: what was said does not fit the device, or is at odds with itself.
    """
    # The longest answer about the longest text: what is read is kept elsewhere.
    kv_tokens = facts.kv_tokens
    if facts.max_decoder_tokens and kv_tokens >= facts.max_decoder_tokens:
        kv_tokens = facts.max_position
    if settings.max_total_tokens is not None and settings.max_total_tokens > kv_tokens:
        raise ConfigurationError(
            f"Not enough memory to handle `max_total_tokens={settings.max_total_tokens}`: the KV cache holds "
            f"{kv_tokens} tokens; lower `--max-total-tokens` or raise `--kv-cache-memory`."
        )
    if settings.max_total_tokens is not None and settings.max_total_tokens > facts.max_position:
        raise ConfigurationError(
            f"`max_total_tokens` must be <= the {facts.max_position} positions of the model. Given: "
            f"{settings.max_total_tokens}"
        )
    longest = min(kv_tokens, facts.max_position)
    if not facts.max_encoder_tokens:  # with an encoder, what the tokenizer says is not meant for both texts together
        longest = min(longest, model_max_length or longest)
    max_total_tokens = settings.max_total_tokens or longest
    longest_input = min(facts.max_encoder_tokens or max_total_tokens, max_total_tokens - 1)
    max_input_tokens = settings.max_input_tokens or longest_input
    if facts.max_encoder_tokens and max_input_tokens > facts.max_encoder_tokens:
        raise ConfigurationError(
            f"`max_input_tokens` must be <= the {facts.max_encoder_tokens} positions of the model's encoder. Given: "
            f"{max_input_tokens}"
        )
    if max_input_tokens >= max_total_tokens:
        raise ConfigurationError(
            f"`max_input_tokens` must be < `max_total_tokens`. Given: {max_input_tokens} and {max_total_tokens}"
        )
    return Limits(
        max_best_of=settings.max_best_of,
        max_stop_sequences=settings.max_stop_sequences,
        max_top_n_tokens=settings.max_top_n_tokens,
        max_input_tokens=max_input_tokens,
        max_total_tokens=max_total_tokens,
        max_client_batch_size=settings.max_client_batch_size,
    )
