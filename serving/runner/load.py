"""From an operator's options to a warm runner: device, type, weights, memory.

Knows no engine.
"""

import contextlib
import logging
import time
from importlib import import_module
from pathlib import Path

import torch

from serving.errors import ConfigurationError, ModelError
from serving.layers.attention.select import fastest
from serving.layers.attention.select import select as select_attention
from serving.layers.builder import Built, LayerBuilder
from serving.layers.lora import AdapterSlots
from serving.models.select import CausalModel
from serving.models.select import select as select_model
from serving.parallel import OneRank, Ranks
from serving.runner.assembly import Assembly, LoadedModel
from serving.runner.footprint import Footprint
from serving.runner.frames import RunnerOptions
from serving.runner.memory import give_back_freed_memory, is_out_of_memory, used_bytes
from serving.runner.model_runner import ModelRunner
from serving.runner.self_check import HasOracle, check
from serving.runner.sizing import reach
from serving.weights.adapters import MergedCheckpoint
from serving.weights.checkpoint import Checkpoint, MissingTensor, SafetensorsCheckpoint, Survey, layerless
from serving.weights.model_config import ModelConfig
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
    if options.max_adapters and config.decoder_start_token_id is not None:
        raise ConfigurationError(
            "--max-lora-adapters: an encoder-decoder is served with an adapter merged into it only; serve the "
            "adapter itself as the model"
        )
    ranks = ranks or OneRank()
    device = choose_device(options, ranks.rank)
    dtype = _dtype(options.dtype, config, device)
    before = used_bytes(device)
    try:
        model, built, adapters = _build(options, config, device, dtype, ranks)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
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
    assembly = Assembly(options, LoadedModel(config, model, built, adapters, device, dtype, ranks))
    step_bytes = assembly.measure_step()
    _tell(config, assembly.planned(), weight_bytes, step_bytes)
    runner = assembly.warm_runner(step_bytes)
    facts = runner.facts
    log.info(
        "%smodel loaded in %.1f s, warm after %.1f s: %s on %s, weights %.1f MB, KV cache %d x %d tokens, %.1f MB",
        f"rank {ranks.rank} of {ranks.size}: " if ranks.size > 1 else "",
        loaded - started, time.monotonic() - started, facts.dtype, facts.device, facts.weight_bytes / 1e6,
        facts.block_count, facts.block_size, facts.kv_bytes / 1e6,
    )  # fmt: skip
    return runner


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
) -> tuple[CausalModel, Built, AdapterSlots | None]:
    architecture = select_model(config, Path(options.model_dir), trust_remote_code=options.trust_remote_code)
    attention = select_attention(fastest(device, dtype))

    def builder(
        checkpoint: Checkpoint, where: torch.device = device, adapters: AdapterSlots | None = None
    ) -> LayerBuilder:
        return LayerBuilder(
            checkpoint, dtype=dtype, device=where, attention=attention, ranks=ranks, adapters=adapters
        )  # fmt: skip

    def slots(checkpoint: Checkpoint) -> AdapterSlots | None:
        if not options.max_adapters:
            return None
        return AdapterSlots(
            checkpoint.names(), count=options.max_adapters, max_rank=options.max_adapter_rank, dtype=dtype,
            device=device, ranks=ranks,
        )  # fmt: skip

    if options.load_format == "dummy":
        # Imported when chosen: transformers costs seconds and hundreds of megabytes that no served model pays.
        dummy = import_module("serving.runner.dummy")
        drawn = dummy.random_checkpoint(Path(options.model_dir), device, dtype)
        adapters = slots(drawn)
        build = builder(drawn, adapters=adapters)
        return architecture(config, build), build.built, adapters
    weights = SafetensorsCheckpoint(Path(options.model_dir))
    merged = MergedCheckpoint(weights, Path(options.adapter_dir)) if options.adapter_dir else None
    adapters = slots(weights)
    build = builder(merged or weights, adapters=adapters)
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
    return model, build.built, adapters


def _tell(config: ModelConfig, planned: Footprint, weight_bytes: int, step_bytes: int) -> None:
    if config.incomplete:  # of a family without an architecture here the sizes are not known
        return
    log.info(
        "planned and measured: weights %.1f and %.1f MB, a step %.1f and %.1f MB, %d bytes of cache a token",
        planned.weight_bytes / 1e6, weight_bytes / 1e6, planned.step_bytes / 1e6, step_bytes / 1e6,
        planned.kv_bytes_per_token,
    )  # fmt: skip
