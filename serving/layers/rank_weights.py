"""A checkpoint's tensors as one rank keeps them: read by name, cut to the rank's part, copied to where they stay.

Knows no layer and no kernel.
"""

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor

from serving.errors import ModelError
from serving.parallel import Ranks
from serving.weights.checkpoint import Checkpoint


class RankWeights:
    """Tensors by the checkpoint's names, scoped by `at`.

    Args:
        dtype: what every weight is converted to.
        device: where every weight is kept.
        ranks: those that share the model out among them.
        on_kept: told the bytes of everything that is kept.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device, ranks: Ranks,
        on_kept: Callable[[int], None],
    ) -> None:  # fmt: skip
        self.checkpoint, self.dtype, self.device, self.ranks = checkpoint, dtype, device, ranks
        self._on_kept = on_kept
        self._prefix, self._transposed = "", False
        self._vocabularies: dict[str, Tensor] = {}

    def at(self, name: str) -> Self:
        """The same, one level deeper in the checkpoint's names; the empty name stays where it is."""
        return self._changed(_prefix=f"{self._prefix}{name}." if name else self._prefix)

    def transposed(self) -> Self:
        """The same for a checkpoint that keeps the weights of linear layers as [in, out]."""
        return self._changed(_transposed=True)

    def full_name(self, name: str) -> str:
        """The checkpoint's name for what is called so here."""
        return self._prefix + name

    def has(self, name: str) -> bool:
        """Whether the checkpoint has this tensor."""
        return self.checkpoint.has(self._prefix + name)

    def read(self, name: str) -> Tensor:
        """The whole tensor, as it lies in the checkpoint. Raises ModelError."""
        return self.checkpoint.read(self._prefix + name)

    def weight(self, name: str) -> Tensor:
        """A linear layer's weight: [out, in], however it lies in the checkpoint."""
        weight = self.read(f"{name}.weight")
        return weight.t() if self._transposed else weight

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The whole tensor, kept. Raises ModelError."""
        return self.kept([self.read(name)], dtype)

    def row_weight(self, name: str) -> Tensor:
        """This rank's inputs of a linear layer's weight, kept: [out, inputs]. Raises ModelError."""
        weight = self.weight(name)
        return self.kept([weight[:, self.own_inputs(name, weight)]])

    def stacked(self, name: str, count: int) -> tuple[Tensor, ...]:
        """As many equal parts of a tensor, one below the other. Raises ModelError."""
        whole = self.read(name)
        if len(whole) % count:
            raise ModelError(f"{self._prefix}{name} has {len(whole)} rows, which {count} experts do not divide")
        return whole.chunk(count)

    def check_outputs(self, name: str, tensor: Tensor, count: int) -> None:
        """Raise ModelError where a weight or bias has another number of outputs."""
        if len(tensor) != count:
            raise ModelError(f"{self._prefix}{name} has {len(tensor)} outputs, but config.json says {count}")

    def kept(self, parts: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """Copy parts, one below the other, to where they stay: a view would change with the mapped file."""
        shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
        kept, filled = torch.empty(shape, device=self.device, dtype=dtype or self.dtype), 0
        for part in parts:
            kept[filled : filled + len(part)].copy_(part)
            filled += len(part)
        self._on_kept(kept.nbytes)
        return kept

    def span(self, name: str, count: int, units: int, *, repeated: bool) -> slice:
        """This rank's part of `count` outputs that are made of `units`, each of which stays whole.

        Args:
            repeated: whether ranks may have the same unit, where there are fewer of them than ranks.

        Raises ModelError.
        """
        size, rank = self.ranks.size, self.ranks.rank
        if count % units:
            raise ModelError(f"{self._prefix}{name} has {count} outputs, which {units} heads do not divide")
        if units % size and not (repeated and size % units == 0):
            what = "outputs" if units == count else "heads"
            raise ModelError(
                f"--num-shard {size}: {size} ranks cannot share the {units} {what} of {self._prefix}{name}"
            )
        first = rank * units // size
        return slice(first * (count // units), (first + max(1, units // size)) * (count // units))

    def shares(self, name: str, tensors: Sequence[Tensor], heads: Sequence[int] | None) -> list[Tensor]:
        """This rank's outputs of layers over one input.

        Args:
            heads: how many heads the outputs of each are made of, which stay whole: the first's are shared out, and
                where there are fewer of the others than ranks, several ranks have the same one.

        Raises ModelError.
        """
        return [
            tensor[self.span(name, len(tensor), heads[i] if heads else len(tensor), repeated=bool(heads) and i > 0)]
            for i, tensor in enumerate(tensors)
        ]

    def own_inputs(self, name: str, weight: Tensor) -> slice:
        """This rank's inputs of a weight [out, in] whose inputs another layer shared out. Raises ModelError."""
        return self.span(name, weight.shape[1], weight.shape[1], repeated=False)

    def vocabulary(self, name: str, size: int) -> Tensor:
        """This rank's rows of a table; read and kept once, whoever asks. Raises ModelError."""
        full_name = self._prefix + name
        if full_name not in self._vocabularies:
            weight = self.read(f"{name}.weight")
            # Everything else fails loudly in the first forward; ids beyond a smaller table only when one comes along.
            if len(weight) != size:
                raise ModelError(f"{name}.weight has {len(weight)} rows, but config.json says vocab_size {size}")
            self._vocabularies[full_name] = self.kept([self.split_vocabulary(weight)])
        return self._vocabularies[full_name]

    def split_vocabulary(self, table: Tensor) -> Tensor:
        """This rank's part of a table by token ids; the same length on all ranks, the last one's filled with zeros."""
        rows = -(-len(table) // self.ranks.size)
        part = table[self.ranks.rank * rows : (self.ranks.rank + 1) * rows]
        return torch.cat((part, part.new_zeros(rows - len(part), *part.shape[1:]))) if len(part) < rows else part

    def _changed(self, **attributes: object) -> Self:
        changed = object.__new__(type(self))
        changed.__dict__.update(self.__dict__, **attributes)
        return changed
