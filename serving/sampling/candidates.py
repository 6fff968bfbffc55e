"""The filters: which tokens stay candidates under top_k, top_p, min_p and typical_p.

Knows no sequence and no noise. Works on the largest logits of a row, in order, since most filters keep few of them;
`narrow` says for which rows the ones that it was given were enough.

Shapes: values [rows, k] float32, descending, equal ones by ascending id; ids [rows, k] int64; parameters [rows, 1].
"""

from typing import Final, NamedTuple

import torch

_BLOCKS_PER_CANDIDATE: Final = 4
_NARROWEST_BLOCK: Final = 8


class Candidates(NamedTuple):
    """Logits that may still be chosen, beside their ids; a filtered one is minus infinity."""

    values: torch.Tensor
    ids: torch.Tensor


def largest(logits: torch.Tensor, count: int) -> Candidates:
    """At least `count` of the largest logits of every row in canonical order, and none below the last of them.

    Which of several ids equal to the last value are among them is not defined, unless `count` is the whole row.
    """
    vocab = logits.shape[-1]
    if count >= vocab:
        return Candidates(*logits.sort(stable=True, dim=-1, descending=True))
    width = vocab // (_BLOCKS_PER_CANDIDATE * count)
    if logits.device.type == "cpu" and len(logits) == 1 and width >= _NARROWEST_BLOCK:
        ids = _in_best_blocks(logits[0], count, width).unsqueeze(0)
    else:
        ids = logits.topk(count, sorted=False).indices.sort(-1).values
    values, order = logits.gather(-1, ids).sort(stable=True, dim=-1, descending=True)
    return Candidates(values, ids.gather(-1, order))


def _in_best_blocks(logits: torch.Tensor, count: int, width: int) -> torch.Tensor:
    """Ascending ids ([k >= count] int64) of one row's largest logits ([vocab]); `torch.topk` without its price.

    The `count`-th largest of the blocks' maxima is a lower bound of the `count`-th largest logit, and everything
    above the bound stands in those blocks or in the rest that fills none.
    """
    blocks = len(logits) // width
    peaks = logits[: blocks * width].unflatten(0, (blocks, width)).amax(-1)
    bounds, chosen = peaks.topk(count, sorted=False)
    inside = (chosen.sort().values.unsqueeze(-1) * width + torch.arange(width)).flatten()
    ids = torch.cat((inside, torch.arange(blocks * width, len(logits))))
    return ids[logits[ids] >= bounds.amin()]


def weight(logits: torch.Tensor) -> torch.Tensor:
    """The sum of every row's exp(logit - best logit): [rows, 1] float64, so that equal shares of it stay exact."""
    return (logits - logits.amax(-1, keepdim=True)).exp_().sum(-1, keepdim=True, dtype=torch.float64)


def narrow(
    candidates: Candidates, row_weight: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> tuple[Candidates, torch.Tensor]:
    """Apply top_k, then top_p, then min_p.

    top_k keeps everything not below the k-th largest, ties too. top_p keeps the fewest best tokens whose mass under
    what top_k left reaches top_p: the tokens with less than top_p before them, which is TGI's "sort ascending, drop
    what cumulates to at most 1 - top_p", always keeping the best. min_p keeps what has at least min_p times the best
    probability.

    Args:
        row_weight: from `weight`, of the whole rows.
        top_k: int64; 0 is off.
        top_p: 1 is off.
        min_p: 0 is off.

    Returns:
        the filtered candidates, and for each row ([rows] bool) whether they are the whole answer: nothing that was
        not given could have stayed or counted.
    """
    values = candidates.values
    last = values[:, -1:]
    kth = values.gather(-1, (top_k - 1).clamp(0, values.shape[-1] - 1))
    kept = (values >= kth) | (top_k == 0)
    best = values[:, :1]
    # A row of minus infinities has no probabilities: NaN compares false, and the best is kept all the same.
    weights = (values - best).exp_().double()
    mass = weights.cumsum(-1)
    limited = torch.where(kept, mass, 0.0).amax(-1, keepdim=True)
    total = torch.where(top_k == 0, row_weight, limited)
    kept &= (mass - weights < top_p.double() * total) | (top_p >= 1.0)
    kept &= values - best >= min_p.log()
    kept[:, 0] = True
    filtered = values.masked_fill(~kept, -torch.inf)
    # Strictly above the last value: else ids that were not given could tie with what was kept.
    enough = torch.where(kept, values, torch.inf).amin(-1, keepdim=True) > last
    enough &= (top_k == 0) | (kth > last)
    # Minus infinity ends what a mask leaves of a row: nothing that was not given is above it.
    enough |= (last == -torch.inf) & (best > -torch.inf)
    return Candidates(filtered, candidates.ids), enough.squeeze(-1)


def typical(candidates: Candidates, mass: torch.Tensor) -> Candidates:
    """Keep the tokens whose surprise is nearest to the row's entropy until their mass reaches `mass`, ties too.

    Locally typical sampling, arXiv 2202.00666, as transformers and TGI compute it; rows with a mass of 1 keep all.
    """
    values = candidates.values
    logprobs = values.log_softmax(-1)
    probabilities = logprobs.exp()
    entropy = -(logprobs * probabilities).double().nansum(-1, keepdim=True)
    distance = (-logprobs - entropy.to(logprobs.dtype)).abs()
    ordered, order = distance.sort(stable=True, dim=-1)
    cumulative = probabilities.gather(-1, order).double().cumsum(-1)
    last = (cumulative < mass.double()).sum(-1, keepdim=True).clamp_max(values.shape[-1] - 1)
    dropped = (distance > ordered.gather(-1, last)) & (mass < 1.0)
    return Candidates(values.masked_fill(dropped, -torch.inf), candidates.ids)
