"""LoRA adapters beside the weights of a running model: rows of one batch may have different ones, or none.

Knows no request and no plan. What is added to a layer's outputs is computed from its inputs, not from a changed weight
(Hu et al. 2021, arXiv:2106.09685), for the tokens of each adapter apart (Chen et al. 2023, arXiv:2310.18547).
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from serving.errors import ModelError
from serving.parallel import Ranks
from serving.weights.adapter_config import ADVICE
from serving.weights.adapter_file import AdapterFile, Lora

_BLANK = -1
_LONGEST_REFUSAL = 300  # characters

log = logging.getLogger(__name__)


class Span(NamedTuple):
    """Tokens of a batch that are computed with one adapter: `length` of them from `start` on; number 0 is none."""

    number: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Part:
    """What a layer keeps of one of the checkpoint's linear layers.

    Attributes:
        name: of the checkpoint's tensor.
        shape: of the whole of it: [out, in].
        outputs: where its outputs are among the layer's.
        rows: which of its outputs those are: [outputs].
        columns: which of its inputs the layer has.
    """

    name: str
    shape: tuple[int, int]
    outputs: slice
    rows: Tensor
    columns: slice


class LayerLora(NamedTuple):
    """One adapter's matrices for one layer.

    Attributes:
        down: of all adapted parts, one below the other: [ranks, in].
        up: each part's where its outputs and its ranks are, zeros elsewhere: [out, ranks].
    """

    down: Tensor
    up: Tensor


class _Active(NamedTuple):
    """An adapter in the current batch, and which tokens are its."""

    layers: Mapping[int, LayerLora]
    tokens: slice


class LoraLinear(nn.Module):
    """A linear layer to whose outputs the adapters of the current batch add theirs.

    Args:
        linear: [tokens, in] -> [tokens, out]; a new tensor every time.
        place: the layer's number among all that can be adapted.
    """

    def __init__(self, linear: nn.Module, place: int, slots: "AdapterSlots") -> None:
        super().__init__()
        self.linear, self.place, self.slots = linear, place, slots

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, in] -> [tokens, out], of all tokens of the batch."""
        y: Tensor = self.linear(x)
        for layers, tokens in self.slots.active:
            if (lora := layers.get(self.place)) is not None:
                y[tokens].addmm_(x[tokens] @ lora.down.T, lora.up.T)
        return y


class AdapterSlots:
    """Owns the loaded adapters, and knows which tokens of the current batch are whose.

    Args:
        names: of all tensors of the base.
        count: how many adapters may be loaded at a time.
        max_rank: the largest rank of one.
    """

    def __init__(
        self, names: Iterable[str], *, count: int, max_rank: int, dtype: torch.dtype, device: torch.device, ranks: Ranks
    ) -> None:  # fmt: skip
        self._names, self._count, self._max_rank = frozenset(names), count, max_rank
        self._dtype, self._device, self._ranks = dtype, device, ranks
        self._layers: list[Sequence[Part]] = []
        self._places: dict[str, int] = {}
        self._loaded: dict[int, dict[int, LayerLora]] = {}
        self.active: list[_Active] = []

    @property
    def reserved_bytes(self) -> int:
        """What all adapters together take at most."""
        numbers = sum(
            self._max_rank * len(parts) * (_inputs(parts[0]) + _outputs(parts)) for parts in self._layers
        )  # fmt: skip
        return self._count * numbers * self._dtype.itemsize

    def layer(self, linear: nn.Module, parts: Sequence[Part]) -> LoraLinear:
        """The layer made adaptable; `parts` are its outputs in their order."""
        place = len(self._layers)
        self._layers.append(parts)
        self._places.update((part.name, place) for part in parts)
        return LoraLinear(linear, place, self)

    def load(self, number: int, directory: Path) -> str | None:
        """Read an adapter, on every rank; why it cannot be served, if it cannot: then nothing is left of it."""
        refusal = None
        try:
            self._loaded[number] = self._read(directory)
        except ModelError as error:
            # It quotes a stranger's file: no text for an answer or a pipe as it is.
            refusal = str(error).encode("utf-8", "backslashreplace").decode()[:_LONGEST_REFUSAL]
        except Exception:
            log.exception("An adapter cannot be read")
            refusal = "it cannot be read"
        if self._ranks.smallest(int(refusal is None)):
            return None
        self.drop(number)
        return refusal or "another rank cannot load the adapter"

    def load_blank(self) -> int:
        """Load the largest adapter there may be, which adds nothing, for measuring. Returns its number."""
        self._loaded[_BLANK] = {
            place: self._layer_lora(parts, [self._blank(part) for part in parts])
            for place, parts in enumerate(self._layers)
        }
        return _BLANK

    def drop(self, number: int) -> None:
        """Forget an adapter that no row uses any more; an unknown one is ignored."""
        self.active = []
        self._loaded.pop(number, None)

    def use(self, spans: Iterable[Span]) -> None:
        """Say whose the tokens of the coming batch are; those in no span are computed without an adapter.

        Args:
            spans: in the batch's order. The fewer adapters take turns, the fewer products there are.
        """
        merged: list[Span] = []
        for span in spans:
            if merged and merged[-1].number == span.number and merged[-1].start + merged[-1].length == span.start:
                merged[-1] = merged[-1]._replace(length=merged[-1].length + span.length)
            elif span.number:
                merged.append(span)
        self.active = [
            _Active(self._loaded[span.number], slice(span.start, span.start + span.length)) for span in merged
        ]

    def _read(self, directory: Path) -> dict[int, LayerLora]:
        adapter = AdapterFile(directory, self._names.__contains__)
        if len(self._loaded) >= self._count:
            raise ModelError(f"there is room for {self._count} adapters")
        if adapter.whole:
            raise ModelError(f"the adapter holds {min(adapter.whole)} whole, which a running model has once: {ADVICE}")
        stray = [name for name in adapter.adapted if name not in self._places]
        if stray:
            raise ModelError(f"the adapter changes {stray[0]}, which a running model keeps as it is: {ADVICE}")
        layers = {}
        for place in sorted({self._places[name] for name in adapter.adapted}):
            parts = self._layers[place]
            found = [(part, lora) for part in parts if (lora := adapter.lora(part.name, part.shape)) is not None]
            layers[place] = self._layer_lora(parts, [self._own(part, lora) for part, lora in found])
        return layers

    def _own(self, part: Part, lora: Lora) -> tuple[slice, Tensor, Tensor]:
        """This rank's outputs of an adapter, with its two matrices; the second has the factor in it."""
        rank = len(lora.a)
        if rank > self._max_rank:
            raise ModelError(f"the adapter has rank {rank} at {part.name}; --max-lora-rank is {self._max_rank}")
        return part.outputs, lora.a[:, part.columns], lora.b[part.rows].float() * lora.scale

    def _blank(self, part: Part) -> tuple[slice, Tensor, Tensor]:
        down, up = (torch.zeros(shape) for shape in ((self._max_rank, _inputs(part)), (len(part.rows), self._max_rank)))
        return part.outputs, down, up

    def _layer_lora(self, parts: Sequence[Part], matrices: Sequence[tuple[slice, Tensor, Tensor]]) -> LayerLora:
        """Copied to where they stay: what an adapter's file gives would change with the file.

        Raises ModelError where something is no finite number.
        """
        down = torch.cat([part_down for _, part_down, _ in matrices]).to(self._device, self._dtype)
        up, first = torch.zeros((_outputs(parts), len(down)), dtype=self._dtype, device=self._device), 0
        for outputs, part_down, part_up in matrices:
            up[outputs, first : first + len(part_down)] = part_up
            first += len(part_down)
        if not bool(down.isfinite().all() and up.isfinite().all()):
            raise ModelError(f"the adapter has matrices for {parts[0].name} that are not finite in {self._dtype}")
        return LayerLora(down, up)


def _inputs(part: Part) -> int:
    return part.columns.stop - part.columns.start


def _outputs(parts: Sequence[Part]) -> int:
    return parts[-1].outputs.stop
