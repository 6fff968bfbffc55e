"""The edits of whole rows of logits, in the order in which they are applied: biases, penalties, temperature.

Knows no sequence and no choice. Every function is elementwise, so a row's result cannot depend on its batch mates, and
exact where its parameter means "off" (1.0 or 0.0), so rows that differ in what they ask for can share one call.
Everything happens in place: for the size of a vocabulary, fresh memory costs more than the arithmetic.

Shapes: logits [rows, vocab] float32; counts [rows, vocab] int32; every parameter [rows, 1] float32.
"""

import torch


def repetition_penalty(logits: torch.Tensor, seen: torch.Tensor, penalty: torch.Tensor) -> None:
    """Make what prompt and output contain less likely (CTRL, arXiv 1909.05858): once for each distinct id."""
    lessened = torch.where(logits < 0, logits * penalty, logits / penalty)
    torch.where(seen > 0, lessened, logits, out=logits)


def relative_frequency_penalty(
    logits: torch.Tensor, seen: torch.Tensor, lengths: torch.Tensor, penalty: torch.Tensor
) -> None:
    """TGI's frequency penalty: the share of an id in prompt and output, times the penalty."""
    logits -= penalty * (seen / lengths)


def frequency_penalty(logits: torch.Tensor, written: torch.Tensor, penalty: torch.Tensor) -> None:
    """OpenAI's frequency penalty: how often an id stands in the output, times the penalty."""
    logits -= penalty * written


def presence_penalty(logits: torch.Tensor, written: torch.Tensor, penalty: torch.Tensor) -> None:
    """OpenAI's presence penalty: subtracted once from every id of the output."""
    logits -= penalty * (written > 0)


def temperature(logits: torch.Tensor, temperatures: torch.Tensor) -> None:
    """Divide by the temperature; a row is first moved so that its best is 0, which no probability notices.

    So the smallest temperature gives the argmax instead of overflowing.
    """
    limits = torch.finfo(logits.dtype)
    logits -= logits.amax(-1, keepdim=True).clamp_min_(limits.min)
    logits /= temperatures.clamp_min(limits.tiny)


def define(logits: torch.Tensor) -> None:
    """Make NaN minus infinity, and plus infinity the largest number."""
    torch.nan_to_num_(logits, nan=-torch.inf, posinf=torch.finfo(logits.dtype).max, neginf=-torch.inf)
