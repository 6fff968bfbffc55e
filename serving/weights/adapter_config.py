"""What a PEFT adapter says of itself: `adapter_config.json`, read once into a frozen record.

Knows no tensor. What could change the model in a way that is not known here is refused.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from serving.errors import ModelError
from serving.weights.model_files import ADAPTER_CONFIG

# What changes nothing in how a finished adapter is applied, or is read below, or is told by the tensors' names.
_UNDERSTOOD = frozenset({
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "alpha_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
})  # fmt: skip
# Those that leave the base as it was; the others (pissa, olora, corda, loftq, ...) change it before training.
_INNOCENT_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
# A regular expression that cannot take long: one plain group at most, never repeated, and few repetitions beside it.
_ATOM = r"(?:[\w-]|\\[.dw-]|\.|\[(?:\w-\w|\w)+\])[*+?]?"
_CALM = re.compile(rf"\^?(?:{_ATOM}|\|)*(?:\((?:\?:)?(?:{_ATOM}|\|)+\))?(?:{_ATOM}|\|)*\$?")
_REPETITION = re.compile(r"(?<!\()[*+?]")
_MOST_REPETITIONS, _MOST_REPEATING_KEYS = 2, 64
_LONGEST = 256  # characters of a key, and of a module's name
_LARGEST = 1 << 20  # bytes of the file; a large one of peft's has a hundredth
_MOST_KEYS = 2048  # of `alpha_pattern`: one for every module of a large model
ADVICE = "merge it with peft's merge_and_unload and serve the result"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """A LoRA adapter that can be merged (Hu et al. 2021, arXiv:2106.09685).

    Attributes:
        base: the model that it changes: a directory, or a model of the hub.
        revision: the base's, where it matters.
        fan_in_fan_out: whether the base keeps its matrices as [in, out].
    """

    base: str
    revision: str | None
    fan_in_fan_out: bool
    alpha: float
    rank_stabilized: bool
    alphas: Sequence[tuple[re.Pattern[str], float]]

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read an adapter's directory. Raises ModelError where it is broken or cannot be merged."""
        try:
            with (directory / ADAPTER_CONFIG).open("rb") as file:
                text = file.read(_LARGEST + 1)
            if len(text) > _LARGEST:
                raise ModelError(f"{ADAPTER_CONFIG} is larger than {_LARGEST} bytes; is it one?")
            said = json.loads(text)
        except (OSError, ValueError, RecursionError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            raise ModelError(f"{ADAPTER_CONFIG} cannot be read: {reason}") from error
        if not isinstance(said, dict):
            raise ModelError(f"{ADAPTER_CONFIG} does not hold a JSON object")
        _check(said)
        base = said.get("base_model_name_or_path")
        if not isinstance(base, str) or not base or not base.isprintable():
            raise ModelError(f"{ADAPTER_CONFIG} names no base model; add it as base_model_name_or_path")
        revision = said.get("revision") or None
        if revision is not None and not isinstance(revision, str):
            raise ModelError(f"{ADAPTER_CONFIG} is broken: revision is {revision!r}, which is no text")
        try:
            return cls(
                base=base,
                revision=revision,
                fan_in_fan_out=bool(said.get("fan_in_fan_out")),
                alpha=_number(said.get("lora_alpha", 8)),
                rank_stabilized=bool(said.get("use_rslora")),
                alphas=_patterns(said.get("alpha_pattern") or {}),
            )
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ModelError(f"{ADAPTER_CONFIG} is broken: {error}") from error

    def scale(self, module: str, rank: int) -> float:
        """The factor of B @ A for a module, `alpha / r`, or `alpha / sqrt(r)` (Kalajdzievski 2023, arXiv:2312.03732).

        A key of `alpha_pattern` is a regular expression that the end of the module's name has to match. Raises
        ModelError where there is no such factor.
        """
        if rank < 1:
            raise ModelError(f"the adapter's matrices for {module} have the rank 0; was it saved whole?")
        if self.alphas and len(module) > _LONGEST:
            raise ModelError(f"the adapter names a module with {len(module)} characters; {ADVICE}")
        found = (alpha for key, alpha in self.alphas if key.match(module))
        return next(found, self.alpha) / (math.sqrt(rank) if self.rank_stabilized else rank)


def _number(said: Any) -> float:
    number = float(said)
    if not math.isfinite(number):
        raise ValueError(f"an alpha is {number}")
    return number


def _patterns(said: Mapping[str, Any]) -> Sequence[tuple[re.Pattern[str], float]]:
    """Keys compiled, as `scale` matches them. Raises ModelError where one could take forever: it is a stranger's."""
    if len(said) > _MOST_KEYS:
        raise ModelError(f"{ADAPTER_CONFIG}: alpha_pattern has {len(said)} keys: {ADVICE}")
    repeating = 0
    for key in said:
        repetitions = len(_REPETITION.findall(key))
        repeating += repetitions > 0
        if len(key) > _LONGEST or repetitions > _MOST_REPETITIONS or not _CALM.fullmatch(key):
            raise ModelError(f"{ADAPTER_CONFIG}: alpha_pattern has {key[:_LONGEST]!r}, too much of a pattern: {ADVICE}")
    if repeating > _MOST_REPEATING_KEYS:
        raise ModelError(f"{ADAPTER_CONFIG}: alpha_pattern has {repeating} keys with repetitions: {ADVICE}")
    try:
        return tuple((re.compile(rf"(.*\.)?({key})$"), _number(alpha)) for key, alpha in said.items())
    except re.error as error:
        raise ModelError(f"{ADAPTER_CONFIG}: alpha_pattern has a broken pattern ({error}): {ADVICE}") from error


def _check(said: Mapping[str, Any]) -> None:
    kind = said.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"the adapter is of the kind {kind!r}; only LORA is served: {ADVICE}")
    if unknown := sorted(key for key, value in said.items() if value and key not in _UNDERSTOOD):
        raise ModelError(f"the adapter has {unknown[0]!r}, which is not served: {ADVICE}")
    if (rank := said.get("r")) is not None and (not isinstance(rank, int) or rank < 1):
        raise ModelError(f"{ADAPTER_CONFIG} is broken: the rank r is {rank!r}")
    start = said.get("init_lora_weights")
    if (start.lower() if isinstance(start, str) else start) not in _INNOCENT_STARTS:
        raise ModelError(f"the adapter started as {start!r}, which changes its base as well: {ADVICE}")
