"""What a model will take of a device's memory, told from its configuration and the headers of its weights alone.

Builds the very layers that will be served, on a device without memory: there is no second bookkeeping to go wrong.
Knows no device and no operator.
"""

from dataclasses import dataclass, replace

import torch

from serving.layers.attention.kv_cache import block_bytes
from serving.layers.attention.select import select as select_attention
from serving.layers.builder import Built, LayerBuilder
from serving.layers.linear import packs
from serving.layers.lora import AdapterSlots
from serving.models.select import select_own
from serving.parallel import OneRank
from serving.runner.inputs import mask_bounds
from serving.weights.checkpoint import Checkpoint
from serving.weights.model_config import ModelConfig

# A CPU computes a step of 512 tokens at nearly its full rate; more would only hold running streams up for longer.
DEFAULT_STEP_TOKENS = {"cpu": 512, "cuda": 4096}
# Logits pass the sampler as float32, and with everything asked for it holds them this many times over.
_LOGIT_COPIES = 6
# Hidden states that are alive at once beside what the widest layer makes: the residual, its norm, an output.
_HIDDEN_COPIES = 4


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes on each of the devices that share a model out.

    Attributes:
        weight_bytes: exact.
        kv_bytes_per_token: exact, over all layers.
        step_bytes: about what the largest step needs beside them.
        adapter_bytes: exact: what is set aside for LoRA adapters.
    """

    weight_bytes: int
    kv_bytes_per_token: int
    step_bytes: int
    adapter_bytes: int = 0


class _FirstRank(OneRank):
    """The first of so many ranks, of which the others are not there: what it computes is nobody's answer."""

    def __init__(self, size: int) -> None:
        self.size = size


def predict(
    config: ModelConfig, checkpoint: Checkpoint, *, dtype: torch.dtype, device_type: str, rank_count: int,
    step_tokens: int, max_rows: int, longest: int, max_adapters: int = 0, max_adapter_rank: int = 0,
) -> Footprint:  # fmt: skip
    """Predict what one of `rank_count` devices will hold.

    Args:
        checkpoint: its tensors may be without data.
        device_type: "cpu" or "cuda": a CPU lays weights out anew, a tied head's too.
        step_tokens: the most tokens of a step.
        max_rows: the most sequences in a step.
        longest: tokens of the longest sequence.
        max_adapters: LoRA adapters that may be loaded at a time.
        max_adapter_rank: the largest rank of one.

    Raises:
        ModelError: the model is not served, cannot be shared out so, or its files do not fit one another.
    """
    device, ranks = torch.device("meta"), _FirstRank(rank_count)
    adapters = AdapterSlots(
        checkpoint.names(), count=max_adapters, max_rank=max_adapter_rank, dtype=dtype, device=device, ranks=ranks
    )
    build = LayerBuilder(
        checkpoint, dtype=dtype, device=device, attention=select_attention("sdpa"), ranks=ranks,
        adapters=adapters if max_adapters else None,
    )  # fmt: skip
    select_own(config)(config, build)
    whole = footprint_of(
        config, build.built, dtype=dtype, rank_count=rank_count, step_tokens=step_tokens, max_rows=max_rows,
        longest=longest,
    )  # fmt: skip
    laid_out_anew = build.built.tied_bytes if packs(device_type, dtype) else 0
    return replace(
        whole, weight_bytes=whole.weight_bytes + laid_out_anew, adapter_bytes=adapters.reserved_bytes
    )  # fmt: skip


def footprint_of(
    config: ModelConfig, built: Built, *, dtype: torch.dtype, rank_count: int, step_tokens: int, max_rows: int,
    longest: int,
) -> Footprint:  # fmt: skip
    """The same of layers that were built, wherever they are. Arguments as of `predict`."""
    # Of an encoder-decoder as if every token were both read and written: at most what a row takes.
    kv_bytes_per_token = block_bytes([*built.kv_shapes, *built.cross_shapes], 1, dtype)
    widest = max(2 * config.intermediate_size, sum(config.qkv_heads) * config.head_dim) // rank_count
    activations = step_tokens * (_HIDDEN_COPIES * config.hidden_size + 2 * widest) * dtype.itemsize
    logits = max_rows * config.vocab_size * torch.float32.itemsize * _LOGIT_COPIES
    # What one layer's attention gathers and masks: the longest sequence's context, for a slice of a chunk.
    context = kv_bytes_per_token // len(built.kv_shapes) * longest
    heads, entries = mask_bounds(built.reads)
    made_of = torch.bool if heads == 1 else torch.float32
    # All masks of a step are made before its first layer, each by way of another type.
    masked = heads * step_tokens * longest
    mask = masked * dtype.itemsize + min(entries, masked) * made_of.itemsize
    return Footprint(
        weight_bytes=built.weight_bytes,
        kv_bytes_per_token=kv_bytes_per_token,
        step_bytes=activations + logits + context + mask,
    )
