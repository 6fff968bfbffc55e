"""From a loaded model to a warm runner: its worst step is measured, and its cache gets the rest of the memory.

Knows no file of a model and no engine.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import cast

import torch
from msgspec import structs

from serving.errors import ConfigurationError, ModelError
from serving.grammar.compiler import GrammarCompiler
from serving.layers.attention.kv_cache import KVCache, block_bytes
from serving.layers.builder import Built
from serving.layers.lora import AdapterSlots
from serving.models.select import CausalModel, EncoderDecoder
from serving.parallel import Ranks
from serving.plan import ModelFacts, StepPlan
from serving.runner.encoder import EncoderStates, slot_bytes
from serving.runner.footprint import DEFAULT_STEP_TOKENS, Footprint, footprint_of
from serving.runner.frames import RunnerOptions
from serving.runner.inputs import InputBuilder
from serving.runner.memory import PeakMeter, available_bytes, is_out_of_memory
from serving.runner.model_runner import ModelRunner
from serving.runner.sizing import BLOCK_SIZE, block_count, kv_budget, reach, row_count, worst_plan
from serving.sampling.sampler import Sampler
from serving.tokenizer import Tokenizer
from serving.weights.checkpoint import SafetensorsCheckpoint
from serving.weights.model_config import ModelConfig
from serving.weights.model_files import tokenizer_directory
from serving.weights.weight_files import listed

log = logging.getLogger("serving.runner")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model on its device, without a cache yet.

    Attributes:
        built: what its layers need of a runner.
        adapters: those that its layers were built with; `None` where they cannot be adapted.
        ranks: those that share it out.
    """

    config: ModelConfig
    model: CausalModel
    built: Built
    adapters: AdapterSlots | None
    device: torch.device
    dtype: torch.dtype
    ranks: Ranks


class Assembly:
    """Makes runners of one model: a small one to measure with, and the one that will serve."""

    def __init__(self, options: RunnerOptions, loaded: LoadedModel) -> None:
        self._options, self._loaded = options, loaded
        self._max_rows = options.max_rows
        # A step must at least hold every running sequence's next token.
        self._step_tokens = max(
            options.max_step_tokens or DEFAULT_STEP_TOKENS[loaded.device.type], options.max_rows
        )  # fmt: skip
        self._reach = reach(options, loaded.config)
        self._compiler = _grammar_compiler(options, loaded.config)

    def planned(self) -> Footprint:
        """What the model and its largest step were expected to take."""
        return footprint_of(
            self._loaded.config, self._loaded.built, dtype=self._loaded.dtype, rank_count=self._loaded.ranks.size,
            step_tokens=self._step_tokens, max_rows=self._max_rows, longest=self._reach.written,
        )  # fmt: skip

    def measure_step(self) -> int:
        """The bytes that the worst step takes at its peak.

        Raises:
            ConfigurationError: there is not enough memory for it (ModelError: the weights do not fit one another).
        """
        meter = PeakMeter(self._loaded.device)
        adapters = self._loaded.adapters
        blank = 0
        try:
            if adapters is not None:
                blank = adapters.load_blank()
            meter.start()
            self._compute_worst_step(blank)
        except (RuntimeError, MemoryError, LookupError, ValueError) as error:
            if is_out_of_memory(error):
                raise ConfigurationError(
                    f"Not enough memory to handle {self._step_tokens} prefill tokens. You need to decrease "
                    f"`--max-batch-prefill-tokens`, or `--max-total-tokens`, which is {self._reach.written}"
                ) from error
            reason = listed(_shapes_at_odds(Path(self._options.model_dir))) or f"the first forward fails: {error}"
            raise ModelError(f"the weights do not fit config.json: {reason}") from error
        peak = meter.peak_bytes()
        if adapters is not None:
            adapters.drop(blank)
        return peak

    def warm_runner(self, step_bytes: int) -> ModelRunner:
        """The runner that will serve: what a step and the adapters leave is its cache's. It has decoded once.

        Raises:
            ConfigurationError: there is not enough memory for the longest sequence.
        """
        options, loaded = self._options, self._loaded
        longest_input, longest, _ = self._reach
        reserved = 0 if loaded.adapters is None else loaded.adapters.reserved_bytes
        if reserved > available_bytes(loaded.device, options.device_memory_fraction) - step_bytes:
            raise ConfigurationError(
                f"--max-lora-adapters {options.max_adapters} and --max-lora-rank {options.max_adapter_rank} set aside "
                f"{reserved / 1e9:.1f} GB, more than there is beside the weights; lower them"
            )
        budget = kv_budget(options, loaded.device, step_bytes + reserved)
        a_slot = slot_bytes(loaded.built.cross_shapes, longest_input, BLOCK_SIZE, loaded.dtype)
        a_block = block_bytes(loaded.built.kv_shapes, BLOCK_SIZE, loaded.dtype)
        rows = loaded.ranks.smallest(row_count(self._max_rows, budget, a_slot, a_block, longest))
        if rows < self._max_rows:
            log.info("room for %d requests at once, each with an input of up to %d tokens", rows, longest_input)
        blocks = loaded.ranks.smallest(block_count(options, budget - rows * a_slot, a_block, rows, longest))
        warm = self._runner(blocks, rows, self._encoder(range(rows)))
        vocab_size = loaded.config.vocab_size
        warm.execute(worst_plan(2, 1, min(longest, BLOCK_SIZE), vocab_size, min(longest_input, 2)))
        warm.execute(StepPlan(rows=[], finished=[0]))
        return warm

    def _compute_worst_step(self, adapter: int) -> None:
        longest_input, longest, _ = self._reach
        worst = worst_plan(self._step_tokens, self._max_rows, longest, self._loaded.config.vocab_size, longest_input)
        worst = structs.replace(worst, started=[structs.replace(row, adapter=adapter) for row in worst.started])
        texts = self._encoder([0] * self._max_rows)
        for row in worst.started:
            if texts is not None and not row.encoder_token_ids:
                texts.reserve(row.sequence_id, longest_input)
        self._runner(2, self._max_rows, texts).execute(worst)

    def _encoder(self, slots: Sequence[int]) -> EncoderStates | None:
        loaded, longest_input = self._loaded, self._reach.read
        if not longest_input:
            return None
        return EncoderStates(
            cast(EncoderDecoder, loaded.model), loaded.built, slots=slots, longest=longest_input,
            at_once=max(self._step_tokens, longest_input), block_size=BLOCK_SIZE, dtype=loaded.dtype,
            device=loaded.device,
        )  # fmt: skip

    def _runner(self, blocks: int, rows: int, texts: EncoderStates | None) -> ModelRunner:
        loaded, built = self._loaded, self._loaded.built
        longest_input, longest, total = self._reach
        cache = KVCache(built.kv_shapes, blocks, BLOCK_SIZE, loaded.dtype, loaded.device)
        facts = ModelFacts(
            vocab_size=loaded.config.vocab_size, max_position=total, block_size=BLOCK_SIZE, block_count=blocks,
            max_step_tokens=self._step_tokens, max_rows=rows,
            dtype=str(loaded.dtype).removeprefix("torch."), device=_device_name(loaded.device),
            weight_bytes=built.weight_bytes * loaded.ranks.size,
            kv_bytes=(cache.nbytes + (0 if texts is None else texts.nbytes)) * loaded.ranks.size,
            rank_count=loaded.ranks.size,
            max_encoder_tokens=longest_input, max_decoder_tokens=longest if longest_input else 0,
        )  # fmt: skip
        inputs = InputBuilder(cache, BLOCK_SIZE, built.reads, loaded.dtype, loaded.device, built.token_reads)
        sampler = None
        if loaded.ranks.rank == 0:
            sampler = Sampler(loaded.config.vocab_size, loaded.device, self._compiler)
        return ModelRunner(loaded.model, inputs, sampler, facts, texts, loaded.adapters)


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
