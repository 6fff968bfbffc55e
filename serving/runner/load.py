"""From an operator's options to a warm runner: device, type, weights, memory.

Knows no engine.
"""

import contextlib
import logging
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import cast

import torch

from serving.errors import ConfigurationError, ModelError
from serving.grammar.compiler import GrammarCompiler
from serving.layers.attention.kv_cache import KVCache, block_bytes
from serving.layers.attention.select import fastest
from serving.layers.attention.select import select as select_attention
from serving.layers.builder import Built, LayerBuilder
from serving.models.select import CausalModel, EncoderDecoder
from serving.models.select import select as select_model
from serving.parallel import OneRank, Ranks
from serving.plan import ModelFacts, StepPlan
from serving.runner.encoder import EncoderStates, slot_bytes
from serving.runner.footprint import DEFAULT_STEP_TOKENS, Footprint, footprint_of
from serving.runner.frames import RunnerOptions
from serving.runner.inputs import InputBuilder
from serving.runner.memory import PeakMeter, give_back_freed_memory, used_bytes
from serving.runner.model_runner import ModelRunner
from serving.runner.self_check import HasOracle, check
from serving.runner.sizing import BLOCK_SIZE, block_count, kv_budget, reach, row_count, worst_plan
from serving.sampling.sampler import Sampler
from serving.tokenizer import Tokenizer
from serving.weights.adapters import MergedCheckpoint
from serving.weights.checkpoint import Checkpoint, MissingTensor, SafetensorsCheckpoint, Survey, layerless
from serving.weights.model_config import ModelConfig
from serving.weights.model_files import tokenizer_directory
from serving.weights.progress import Progress
from serving.weights.weight_files import listed

log = logging.getLogger("serving.runner")
_NOT_WEIGHTS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias",
                "lm_head.weight", "embed_out.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight",
                "EncDecAttention.relative_attention_bias.weight")  # fmt: skip


def load_runner(options: RunnerOptions, ranks: Ranks | None = None) -> ModelRunner:
    """Load a model, measure its worst step, give the rest of the memory to its KV cache, and decode once.

    Args:
        ranks: those that share the model out, each of which calls this.

    Raises:
        ConfigurationError: the model cannot be served here (ModelError: because of its files).
    """
    started = time.monotonic()
    config = ModelConfig.load(Path(options.model_dir))
    ranks = ranks or OneRank()
    device = choose_device(options, ranks.rank)
    dtype = _dtype(options.dtype, config, device)
    before = used_bytes(device)
    try:
        model, built = _build(options, config, device, dtype, ranks)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        raise ConfigurationError(
            f"The weights do not fit the memory of {device}: `weir plan` says what they take; --num-shard shares them "
            "out over several devices"
        ) from error
    if config.decoder_start_token_id is not None and not built.cross_shapes:
        raise ModelError(f"config.json says is_encoder_decoder, and {config.model_type!r} is none")
    give_back_freed_memory()
    weight_bytes = used_bytes(device) - before
    if isinstance(model, HasOracle):
        longest = reach(options, config).written
        check(model, built, vocab_size=config.vocab_size, longest=longest, dtype=dtype, device=device)
    loaded = time.monotonic()
    runner = _size_and_warm(options, config, model, built, device, dtype, ranks, weight_bytes)
    facts = runner.facts
    log.info(
        "%smodel loaded in %.1f s, warm after %.1f s: %s on %s, weights %.1f MB, KV cache %d x %d tokens, %.1f MB",
        f"rank {ranks.rank} of {ranks.size}: " if ranks.size > 1 else "",
        loaded - started, time.monotonic() - started, facts.dtype, facts.device, facts.weight_bytes / 1e6,
        facts.block_count, facts.block_size, facts.kv_bytes / 1e6,
    )  # fmt: skip
    return runner


def _is_out_of_memory(error: Exception) -> bool:
    # Of a CPU's allocator torch makes no type of its own.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "memory" in str(error).lower()


def choose_device(options: RunnerOptions, rank: int) -> torch.device:
    """Where a rank computes. Raises ConfigurationError where there is no such device."""
    name, count = options.device, torch.cuda.device_count()
    if name == "cpu" or (name == "auto" and not count):
        return torch.device("cpu")
    if not count:
        raise ConfigurationError("--device cuda: torch sees no GPU here; check the driver, or use --device cpu")
    if count < options.rank_count:
        raise ConfigurationError(
            f"--num-shard {options.rank_count}: torch sees {count} GPUs here; give at most as many"
        )
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)  # what NCCL and kernels that are given no device take
    return device


def _dtype(asked: str | None, config: ModelConfig, device: torch.device) -> torch.dtype:
    """The checkpoint's own type unless asked otherwise; float16 does not compute on a CPU."""
    name = asked or config.dtype or "float32"
    dtype = getattr(torch, name, None)
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ModelError(f"dtype {name!r} is not served; give --dtype bfloat16, float16 or float32")
    if device.type == "cpu" and dtype == torch.float16:
        if asked:
            log.warning("a CPU does not compute in float16: computing in float32")
            return torch.float32
        return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    if dtype == torch.float16 and config.leaves_float16:
        wide = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
        log.warning("%s leaves the range of float16: computing in %s", config.model_type, wide)
        return wide
    return dtype


def _build(
    options: RunnerOptions, config: ModelConfig, device: torch.device, dtype: torch.dtype, ranks: Ranks
) -> tuple[CausalModel, Built]:
    architecture = select_model(config, Path(options.model_dir), trust_remote_code=options.trust_remote_code)
    attention = select_attention(fastest(device, dtype))

    def builder(checkpoint: Checkpoint, where: torch.device = device) -> LayerBuilder:
        return LayerBuilder(checkpoint, dtype=dtype, device=where, attention=attention, ranks=ranks)

    if options.load_format == "dummy":
        # Imported when chosen: transformers costs seconds and hundreds of megabytes that no served model pays.
        dummy = import_module("serving.runner.dummy")
        build = builder(dummy.random_checkpoint(Path(options.model_dir), device, dtype))
        return architecture(config, build), build.built
    weights = SafetensorsCheckpoint(Path(options.model_dir))
    merged = MergedCheckpoint(weights, Path(options.adapter_dir)) if options.adapter_dir else None
    build = builder(merged or weights)
    with Progress("Loading weights", weights.total_bytes, shown=ranks.rank == 0) as progress:
        weights.on_read = progress.add
        try:
            model = architecture(config, build)
        except MissingTensor as first:
            survey = Survey(weights)
            # What became of it does not matter: a tensor without a like ends it, as may a shape that does not fit.
            with contextlib.suppress(Exception):
                architecture(config, builder(survey, torch.device("meta")))
            raise MissingTensor(survey.missing or [first.name]) from first
    if merged is not None:
        merged.check_all_used()
    # Old checkpoints carry computed buffers, tied ones a head that nobody reads.
    unread = [name for name in weights.unread() if not name.endswith(_NOT_WEIGHTS)]
    if unread and ranks.rank == 0:
        kinds = sorted({layerless(name) for name in unread})
        log.warning("%d tensors of the checkpoint are not used: %s", len(unread), listed(kinds))
    return model, build.built


def _shapes_at_odds(directory: Path) -> list[str]:
    """The tensors that have another shape than a model with this configuration, as far as transformers knows it."""
    try:
        expected = import_module("serving.runner.dummy").file_shapes(directory)
        found = SafetensorsCheckpoint(directory).shapes()
    except Exception:  # what could not be explained better keeps its first explanation
        return []
    return [
        f"{name} is {list(shape)} instead of {list(expected[name])}"
        for name, shape in sorted(found.items())
        if expected.get(name, shape) != shape
    ]


def _size_and_warm(
    options: RunnerOptions, config: ModelConfig, model: CausalModel, built: Built,
    device: torch.device, dtype: torch.dtype, ranks: Ranks, weight_bytes: int,
) -> ModelRunner:  # fmt: skip
    max_rows = options.max_rows
    # A step must at least hold every running sequence's next token.
    step_tokens = max(options.max_step_tokens or DEFAULT_STEP_TOKENS[device.type], max_rows)
    longest_input, longest, total = reach(options, config)
    compiler = _grammar_compiler(options, config)

    def encoder(slots: Sequence[int]) -> EncoderStates | None:
        if not longest_input:
            return None
        return EncoderStates(
            cast(EncoderDecoder, model), built, slots=slots, longest=longest_input,
            at_once=max(step_tokens, longest_input), block_size=BLOCK_SIZE, dtype=dtype, device=device,
        )  # fmt: skip

    def runner(blocks: int, rows: int, texts: EncoderStates | None) -> ModelRunner:
        cache = KVCache(built.kv_shapes, blocks, BLOCK_SIZE, dtype, device)
        facts = ModelFacts(
            vocab_size=config.vocab_size, max_position=total, block_size=BLOCK_SIZE, block_count=blocks,
            max_step_tokens=step_tokens, max_rows=rows,
            dtype=str(dtype).removeprefix("torch."), device=_device_name(device),
            weight_bytes=built.weight_bytes * ranks.size,
            kv_bytes=(cache.nbytes + (0 if texts is None else texts.nbytes)) * ranks.size, rank_count=ranks.size,
            max_encoder_tokens=longest_input, max_decoder_tokens=longest if longest_input else 0,
        )  # fmt: skip
        inputs = InputBuilder(cache, BLOCK_SIZE, built.reads, dtype, device, built.token_reads)
        sampler = Sampler(config.vocab_size, device, compiler) if ranks.rank == 0 else None
        return ModelRunner(model, inputs, sampler, facts, texts)

    def compute_worst_step() -> None:
        worst = worst_plan(step_tokens, max_rows, longest, config.vocab_size, longest_input)
        texts = encoder([0] * max_rows)
        for row in worst.started:
            if texts is not None and not row.encoder_token_ids:
                texts.reserve(row.sequence_id, longest_input)
        runner(2, max_rows, texts).execute(worst)

    meter = PeakMeter(device)
    meter.start()
    try:
        compute_worst_step()
    except (RuntimeError, MemoryError, LookupError, ValueError) as error:
        if _is_out_of_memory(error):
            raise ConfigurationError(
                f"Not enough memory to handle {step_tokens} prefill tokens. "
                f"You need to decrease `--max-batch-prefill-tokens`, or `--max-total-tokens`, which is {longest}"
            ) from error
        reason = listed(_shapes_at_odds(Path(options.model_dir))) or f"the first forward fails: {error}"
        raise ModelError(f"the weights do not fit config.json: {reason}") from error
    activations = meter.peak_bytes()
    planned = footprint_of(
        config, built, dtype=dtype, rank_count=ranks.size, step_tokens=step_tokens, max_rows=max_rows, longest=longest
    )
    _tell(config, planned, weight_bytes, activations)
    budget = kv_budget(options, device, activations)
    a_slot = slot_bytes(built.cross_shapes, longest_input, BLOCK_SIZE, dtype)
    a_block = block_bytes(built.kv_shapes, BLOCK_SIZE, dtype)
    rows = ranks.smallest(row_count(max_rows, budget, a_slot, a_block, longest))
    if rows < max_rows:
        log.info("room for %d requests at once, each with an input of up to %d tokens", rows, longest_input)
    blocks = ranks.smallest(block_count(options, budget - rows * a_slot, a_block, rows, longest))
    warm = runner(blocks, rows, encoder(range(rows)))
    warm.execute(worst_plan(2, 1, min(longest, BLOCK_SIZE), config.vocab_size, min(longest_input, 2)))
    warm.execute(StepPlan(rows=[], finished=[0]))
    return warm


def _tell(config: ModelConfig, planned: Footprint, weight_bytes: int, step_bytes: int) -> None:
    if config.incomplete:  # of a family without an architecture here the sizes are not known
        return
    log.info(
        "planned and measured: weights %.1f and %.1f MB, a step %.1f and %.1f MB, %d bytes of cache a token",
        planned.weight_bytes / 1e6, weight_bytes / 1e6, planned.step_bytes / 1e6, step_bytes / 1e6,
        planned.kv_bytes_per_token,
    )  # fmt: skip


def _grammar_compiler(options: RunnerOptions, config: ModelConfig) -> GrammarCompiler | None:
    if not options.grammars:
        return None
    try:
        tokenizer_json = Tokenizer.load(tokenizer_directory(options.model_dir, options.adapter_dir)).to_json()
        return GrammarCompiler(tokenizer_json, vocab_size=config.vocab_size, eos_token_ids=options.eos_token_ids)
    except ModelError as error:
        log.warning("no grammars: %s", error)
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    return torch.cuda.get_device_name(device).lower().replace(" ", "-")
