"""The workloads: which prompts arrive together, and how many tokens each wants.

Knows nobody who computes them: the same jobs go to the engine, to the server and to the peer.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from scripts.bench.models import SPECIAL_TOKENS


@dataclass(frozen=True, slots=True)
class Job:
    """One request.

    Attributes:
        prompt: token ids.
        wanted: exactly how many tokens to generate.
    """

    prompt: list[int]
    wanted: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that arrive at once.

    Attributes:
        make: the jobs, from a source of randomness and the size of the vocabulary. Every call with another source
            draws other tokens, so that no cache carries anything from one repetition to the next; the lengths are
            always the same.
    """

    description: str
    make: Callable[[random.Random, int], list[Job]]


def random_ids(source: random.Random, vocab_size: int, count: int) -> list[int]:
    """Ids that are no special tokens."""
    return [source.randrange(len(SPECIAL_TOKENS), vocab_size) for _ in range(count)]


def longest(jobs: list[Job]) -> int:
    """The tokens of the longest sequence, prompt and answer."""
    return max(len(job.prompt) + job.wanted for job in jobs)


def _single(source: random.Random, vocab_size: int) -> list[Job]:
    return [Job(random_ids(source, vocab_size, 128), 128)]


def _ragged(source: random.Random, vocab_size: int) -> list[Job]:
    lengths = random.Random(16)
    sizes = [(lengths.randint(16, 256), lengths.randint(16, 128)) for _ in range(16)]
    return [Job(random_ids(source, vocab_size, prompt), wanted) for prompt, wanted in sizes]


def _shared(source: random.Random, vocab_size: int) -> list[Job]:
    prefix = random_ids(source, vocab_size, 256)
    return [Job(prefix + random_ids(source, vocab_size, 8), 32) for _ in range(64)]


def _small(source: random.Random, vocab_size: int) -> list[Job]:
    return [Job(random_ids(source, vocab_size, 4 + i), 3 + i) for i in range(3)]


WORKLOADS: Mapping[str, Workload] = {
    "a": Workload("1 request, 128 in, 128 out", _single),
    "b": Workload("16 at once, 16..256 in, 16..128 out", _ragged),
    "c": Workload("64 at once, 256 shared + 8 own in, 32 out", _shared),
    "s": Workload("3 at once, 4..6 in, 3..5 out: only to try the script", _small),
}
