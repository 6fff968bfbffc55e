"""How a device's memory is shared out: which step is the worst, what it leaves, and how many blocks and rows that is.

Knows no model and no tensor: it is given shapes in bytes.
"""

from typing import NamedTuple

import torch

from serving.errors import ConfigurationError
from serving.plan import NewRow, Row, StepPlan
from serving.protocol import SamplingParams, Watermark
from serving.runner.frames import RunnerOptions
from serving.runner.inputs import MAX_GROUP_TOKENS
from serving.runner.memory import available_bytes
from serving.weights.model_config import ModelConfig

BLOCK_SIZE = 16
_DEFAULT_CPU_KV_BYTES = 4 << 30


class Reach(NamedTuple):
    """How far a model's texts go, in tokens.

    Attributes:
        read: the longest text that an encoder reads; 0 where there is none.
        written: the longest sequence of a decoder.
        total: what both may have together, or the positions that a decoder alone was made for.
    """

    read: int
    written: int
    total: int


def reach(options: RunnerOptions, config: ModelConfig) -> Reach:
    """Unless the operator says more, either side of an encoder-decoder may be as long as it was in training.

    Where positions have an end, nobody may say more.
    """
    made_for, total = config.max_position_embeddings, options.max_total_tokens
    if config.decoder_start_token_id is None:
        # Who asks for more is refused with a reason later; a table of learned positions would fail here without one.
        return Reach(0, min(total or made_for, made_for), made_for)
    read = options.max_input_tokens or (max(1, total - 1) if total else made_for)
    if config.positions_end:
        read = min(read, made_for)
        total = min(total or read + made_for, read + made_for)
        return Reach(read, min(total, made_for), total)
    total = total or read + made_for
    return Reach(read, total, total)


def worst_plan(step_tokens: int, max_rows: int, longest: int, vocab_size: int, longest_input: int) -> StepPlan:
    """The step that needs the most memory: all rows sampled with everything on, one of them a chunk at the end of
    the longest sequence, the others single tokens that fill one attention group. All share block 1: what is
    measured is memory, not the answer. The first rows bring as many texts as an encoder computes at once.
    """
    context = max(1, min(longest, MAX_GROUP_TOKENS // max_rows))
    chunk = min(step_tokens - max_rows + 1, longest)
    lengths = [(context, 1)] * (max_rows - 1) + [(longest, chunk)]
    everything = SamplingParams(
        do_sample=True, temperature=0.7, top_k=50, top_p=0.9, typical_p=0.9, min_p=0.01, repetition_penalty=1.1,
        relative_frequency_penalty=0.1, top_n_tokens=5, watermark=Watermark(gamma=1.0, delta=0.1),
    )  # fmt: skip
    texts = max(1, min(max_rows, step_tokens // longest_input)) if longest_input else 0
    rows, started = [], []
    for i, (length, count) in enumerate(lengths):
        table = [1] * -(-length // BLOCK_SIZE)
        ids = [t % vocab_size for t in range(count)]
        rows.append(Row(sequence_id=i, token_ids=ids, position=length - count, block_table=table, sample=True))
        text = [(t + i) % vocab_size for t in range(longest_input)] if i < texts else []
        started.append(
            NewRow(sequence_id=i, token_ids=ids, prompt_length=count, sampling=everything, encoder_token_ids=text)
        )
    return StepPlan(rows=rows, started=started)


def kv_budget(options: RunnerOptions, device: torch.device, activations: int) -> int:
    """Bytes for keys and values of every kind. Raises ConfigurationError where there is less than was said."""
    left = available_bytes(device, options.device_memory_fraction) - activations
    if device.type != "cpu":
        return left
    # What the ranks of one machine leave is shared out among their caches.
    budget = (options.kv_cache_bytes or min(left // 2, _DEFAULT_CPU_KV_BYTES)) // options.rank_count
    if budget * options.rank_count > left:
        raise ConfigurationError(
            f"--kv-cache-memory {options.kv_cache_bytes} does not fit: {left} bytes are left beside the weights "
            "and a step"
        )
    return budget


def row_count(max_rows: int, budget: int, a_slot: int, a_block: int, longest: int) -> int:
    """Rows at once: with an encoder no more than have room for the longest text.

    Beside it every row gets room for half of the longest sequence: the whole would let too few in, as answers are
    mostly shorter; without any, those let in would put one another back.
    """
    if not a_slot:
        return max_rows
    an_answer = -(-longest // (2 * BLOCK_SIZE)) * a_block
    return max(1, min(max_rows, (budget - a_block) // (a_slot + an_answer)))


def block_count(options: RunnerOptions, budget: int, a_block: int, rows: int, longest: int) -> int:
    a_sequence = -(-longest // BLOCK_SIZE)
    # All rows at full length: rows are mostly shorter, and what they leave is the prefix cache's.
    blocks = min(budget // a_block, rows * a_sequence + 1)
    needed = (a_sequence if options.max_total_tokens else 1) + 1
    if blocks < needed:
        raise ConfigurationError(
            f"Not enough memory to handle `max_total_tokens={longest}`: the KV cache would hold "
            f"{max(0, blocks - 1) * BLOCK_SIZE} tokens; decrease it, or give the cache more memory"
        )
    return blocks
