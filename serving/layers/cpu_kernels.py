"""The operations of cpu_kernels.c on tensors: bfloat16, on a CPU, only where the compiled library is there.

Knows no layer; every caller has a slow twin in torch. Arguments are checked by assertions that `-O` drops.
"""

import ctypes
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

_POINTER, _SIZE, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
_SIGNATURES = {
    "weir_attend": [
        _POINTER, _POINTER, _SIZE, *[_POINTER] * 3, _SIZE, _POINTER, *[_SIZE] * 6, _FLOAT, _FLOAT, _SIZE, _POINTER,
    ],
    "weir_store": [_POINTER, _POINTER, _SIZE, _POINTER, _SIZE, _SIZE],
    "weir_rms_norm": [_POINTER, _POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _FLOAT],
    "weir_wide_rms_norm": [_POINTER, _POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _FLOAT],
    "weir_rotate": [_POINTER, _POINTER, _SIZE, _SIZE, _POINTER, _POINTER, *[_SIZE] * 4, ctypes.c_int],
    "weir_silu_gate": [_POINTER, _POINTER, _SIZE, _SIZE],
    "weir_gelu_gate": [_POINTER, _POINTER, _SIZE, _SIZE],
}  # fmt: skip


def compiled_library() -> Path | None:
    """Where the library lies; `None` where installing found no C compiler."""
    spec = find_spec("serving.layers._cpu_kernels")
    return Path(spec.origin) if spec is not None and spec.origin is not None else None


def load(device: torch.device, dtype: torch.dtype) -> "CpuKernels | None":
    """The kernels, where this device and type have them."""
    library = compiled_library() if device.type == "cpu" and dtype == torch.bfloat16 else None
    return None if library is None else CpuKernels(library)


class CpuKernels:
    """The library's functions. It shares the threads of torch, whose OpenMP it is linked to by name."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = arguments, None
        self._attend, self._store = self._library.weir_attend, self._library.weir_store
        self._rms_norm, self._wide_rms_norm = self._library.weir_rms_norm, self._library.weir_wide_rms_norm
        self._silu_gate, self._gelu_gate = self._library.weir_silu_gate, self._library.weir_gelu_gate
        self._rotate = self._library.weir_rotate

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, tables: Tensor, positions: Tensor, scale: float, window: int,
        softcap: float = 0.0, slopes: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """One query token a row over its own blocks, read in place.

        Args:
            query: [rows, heads, head_dim]; rows may lie apart.
            keys: [blocks, block_size, kv_heads, head_dim].
            values: likewise, or the first `value_dim` numbers of every key.
            tables: block ids, [rows * blocks a row].
            positions: of the queries, [rows].
            window: how many positions back a query looks, itself included; 0 for all.
            softcap: what scores are kept within by a tangent; 0 for nothing.
            slopes: what every head's scores lose a position between key and query, [heads] in float32.

        Returns:
            [rows, heads * size of a value].
        """
        rows, heads, head_dim = query.shape
        _, block_size, kv_heads, _ = keys.shape
        assert query.stride()[1:] == (head_dim, 1)
        assert keys.is_contiguous()
        assert values.stride() == keys.stride()
        assert slopes is None or (slopes.is_contiguous() and slopes.dtype == torch.float32)
        value_dim = values.shape[-1]
        if heads % kv_heads or keys.shape[-1] != head_dim:
            raise RuntimeError(f"{heads} heads of {head_dim} for a cache of {list(keys.shape[2:])}")
        output = query.new_empty(rows, heads * value_dim)
        self._attend(
            output.data_ptr(), query.data_ptr(), query.stride(0), keys.data_ptr(), values.data_ptr(),
            tables.data_ptr(), len(tables) // rows, positions.data_ptr(), rows, heads, kv_heads, head_dim, value_dim,
            block_size, scale, softcap, window, None if slopes is None else slopes.data_ptr(),
        )  # fmt: skip
        return output

    def store(self, cache: Tensor, x: Tensor, slots: Tensor) -> None:
        """Copy x [tokens, kv_heads, head_dim] to the slots [tokens] of a cache [blocks, block_size, ...]."""
        tokens, kv_heads, head_dim = x.shape
        assert x.stride()[1:] == (head_dim, 1)
        # Weights may be wider than config.json says, and C would write beyond the cache.
        if cache.shape[2:] != x.shape[1:]:
            raise RuntimeError(f"heads of {list(x.shape[1:])} for a cache of {list(cache.shape[2:])}")
        self._store(cache.data_ptr(), x.data_ptr(), x.stride(0), slots.data_ptr(), tokens, kv_heads * head_dim)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `layers.norm.RMSNorm`: [..., size] -> the same. The weight may be in float32."""
        x = x.contiguous()
        output, size = torch.empty_like(x), len(weight)
        norm = self._wide_rms_norm if weight.dtype == torch.float32 else self._rms_norm
        norm(
            output.data_ptr(), x.data_ptr(), size, weight.data_ptr(), x.numel() // size, size, eps
        )  # fmt: skip
        return output

    def rotate(self, x: Tensor, cosines: Tensor, sines: Tensor, *, pairs: bool = False) -> Tensor:
        """See `layers.rotary.rotate`, or `rotate_pairs`: [tokens, heads, head_dim] -> the same.

        Args:
            cosines: [tokens, 1, size], as `sines`: what follows the first `size` numbers of a head is kept.
        """
        tokens, heads, head_dim = x.shape
        assert x.stride(2) == 1
        if cosines.shape[-1] > head_dim:
            raise RuntimeError(f"angles of {cosines.shape[-1]} numbers for heads of {head_dim}")
        assert cosines.is_contiguous()
        assert sines.is_contiguous()
        output = torch.empty(x.shape, dtype=x.dtype)
        self._rotate(
            output.data_ptr(), x.data_ptr(), x.stride(0), x.stride(1), cosines.data_ptr(), sines.data_ptr(), tokens,
            heads, head_dim, cosines.shape[-1], pairs,
        )  # fmt: skip
        return output

    def silu_gate(self, gate_up: Tensor) -> Tensor:
        """[tokens, 2 * size], gate beside up -> silu(gate) * up: [tokens, size]."""
        return _gated(self._silu_gate, gate_up)

    def gelu_gate(self, gate_up: Tensor) -> Tensor:
        """The same with `layers.activation.gelu_tanh`."""
        return _gated(self._gelu_gate, gate_up)


def _gated(gate: Callable[..., None], gate_up: Tensor) -> Tensor:
    tokens, width = gate_up.shape
    assert gate_up.is_contiguous()
    output = gate_up.new_empty(tokens, width // 2)
    gate(output.data_ptr(), gate_up.data_ptr(), tokens, width // 2)
    return output
