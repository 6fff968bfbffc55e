"""The watermark of generated text: a bias towards the half of the vocabulary that the token before chooses.

Kirchenbauer et al. 2023 (arXiv:2301.10226), soft red list, left hash of one token, with TGI's numbers, so that
detectors made for TGI find it. Knows no sequence.
"""

from collections.abc import Sequence
from typing import Final

import torch

from serving.protocol import Watermark

# The authors' own; a detector has to use the same.
_HASH_KEY: Final = 15485863


def favour(logits: torch.Tensor, previous: Sequence[int], marks: Sequence[Watermark]) -> None:
    """Add each row's `delta` to the logits of its green ids, in place.

    The permutation is the one of torch's generator for the device of the logits, so CPUs and GPUs have different lists.

    Args:
        logits: [rows, vocab] float32.
        previous: the token before the one to choose, for each row.
    """
    draw = torch.Generator(device=logits.device)
    vocab_size = logits.shape[-1]
    for line, token_id, mark in zip(logits, previous, marks, strict=True):
        draw.manual_seed(_HASH_KEY * token_id)
        permuted = torch.randperm(vocab_size, generator=draw, device=logits.device)
        line[permuted[: int(vocab_size * mark.gamma)]] += mark.delta
