"""Whether a model fits a device, and how fast it can be there at most.

Knows no file and no command line: bytes and tokens in, bytes and tokens out.
"""

from dataclasses import dataclass

from serving.runner.footprint import Footprint


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked of a deployment.

    Attributes:
        context: tokens of the longest request, prompt and answer.
        concurrency: how many requests of that length are in the cache at once.
        adapters: how many LoRA adapters may be loaded at a time.
        adapter_rank: the largest rank of one.
    """

    context: int
    concurrency: int
    adapters: int = 0
    adapter_rank: int = 0


@dataclass(frozen=True, slots=True)
class Fit:
    """How a demand and a device go together.

    Attributes:
        kv_tokens: how many tokens the cache holds.
        most_context: the longest request at the concurrency asked for, up to the model's own positions.
        most_concurrency: how many requests of the length asked for.
        tokens_per_s: of all requests together, at most: what reading weights and cache once a step allows.
    """

    fits: bool
    kv_tokens: int
    most_context: int
    most_concurrency: int
    tokens_per_s: float


def fit(footprint: Footprint, demand: Demand, *, memory_bytes: int, bandwidth_gb: float, max_position: int) -> Fit:
    """How a model goes with a device, or with as many as its footprint was made for.

    Args:
        memory_bytes: what each device has for weights, a step and the cache.
        bandwidth_gb: GB a second that each reads.
        max_position: positions that the model was made for.
    """
    kv_bytes = memory_bytes - footprint.weight_bytes - footprint.step_bytes - footprint.adapter_bytes
    kv_tokens = max(0, kv_bytes // footprint.kv_bytes_per_token)
    read = footprint.weight_bytes + demand.concurrency * demand.context * footprint.kv_bytes_per_token
    return Fit(
        fits=kv_tokens >= demand.context * demand.concurrency,
        kv_tokens=kv_tokens,
        most_context=min(max_position, kv_tokens // demand.concurrency),
        most_concurrency=kv_tokens // demand.context,
        tokens_per_s=demand.concurrency * bandwidth_gb * 1e9 / read,
    )
