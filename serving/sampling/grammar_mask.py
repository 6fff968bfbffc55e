"""The masks of grammars: which tokens a step's rows may choose.

Knows no sequence and no choice. Bits are made on the host, a word for 32 tokens, and spread on the logits' device.
"""

from collections.abc import Sequence

import torch

from serving.grammar.compiler import GrammarCompiler, Matcher


class GrammarMasks:
    """Makes and applies the masks of one device."""

    def __init__(self, compiler: GrammarCompiler, device: torch.device) -> None:
        self._compiler = compiler
        self._device = device
        set_bits = torch.arange(256).unsqueeze(-1) >> torch.arange(8) & 1
        # For every byte of a mask what to add to eight logits: several times faster than to test each bit.
        self._addends = torch.where(set_bits == 1, 0.0, -torch.inf).to(device)  # [256, 8]

    def bits(self, matchers: Sequence[Matcher]) -> torch.Tensor:
        """What each matcher allows: [matchers, words] int32 on the device; look at the matchers' `error` then."""
        shape = (len(matchers), self._compiler.mask_words)
        host = torch.empty(shape, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        self._compiler.fill(matchers, host.data_ptr())
        return host.to(self._device, non_blocking=True)

    def apply(self, logits: torch.Tensor, bits: torch.Tensor) -> None:
        """Make minus infinity, in place, of the logits whose bits are not set.

        Args:
            logits: [rows, vocab] float32, neither NaN nor plus infinity.
            bits: [rows, words] int32, the lowest bit of the first word first.
        """
        addends = torch.nn.functional.embedding(bits.view(torch.uint8).int(), self._addends)  # [rows, bytes, 8]
        logits += addends.flatten(1)[:, : logits.shape[-1]]
