"""Adapters beside a running model equal the same adapters merged into it, in batches of rows with different ones."""

import math
import re
from pathlib import Path

import pytest
import torch
from models.cases import CASES, randomized
from models.hand_fed import CPU, Ours, row, worst_difference
from models.lora_files import drawn, save_adapter
from models.rank_threads import on_ranks

from serving.errors import ModelError
from serving.layers.lora import AdapterSlots
from serving.parallel import OneRank
from serving.weights.adapter_file import PREFIX
from serving.weights.adapters import MergedCheckpoint
from serving.weights.checkpoint import SafetensorsCheckpoint

TEXTS = [[(11 * i + j) % 131 for i in range(20)] for j in range(4)]
TABLES = [list(range(8 * j + 1, 8 * j + 9)) for j in range(4)]
WHOSE = (1, 0, 2, 1)  # of each text


class Recording(AdapterSlots):
    """Slots that tell which layers can be adapted."""

    def __init__(self, directory, ranks=None, count=2, max_rank=4):
        names = SafetensorsCheckpoint(directory).names()
        super().__init__(
            names, count=count, max_rank=max_rank, dtype=torch.float32, device=CPU, ranks=ranks or OneRank()
        )
        self.parts = []

    def layer(self, linear, parts):
        self.parts += parts
        return super().layer(linear, parts)


def shapes(slots):
    return {part.name: part.shape for part in slots.parts}


def saved_base(case, directory):
    randomized(CASES[case]).save_pretrained(directory / "base")
    return directory / "base"


def two_adapters(base, directory):
    """One for every layer that can be adapted, and one for some of them."""
    slots = Recording(base)
    Ours(base, adapters=slots)
    weights = SafetensorsCheckpoint(base)
    across = any(tuple(weights.read(part.name).shape) != part.shape for part in slots.parts)
    assert slots.parts
    return [
        save_adapter(directory / "all", drawn(shapes(slots), 1), across),
        save_adapter(directory / "some", drawn(shapes(slots), 2, rank=2, share=0.5), across),
    ]


def merged_logits(base, adapter, ids):
    """Of a whole text with the adapter merged into the model, or of the model as it is."""
    weights = SafetensorsCheckpoint(base)
    ours = Ours(base, weights=MergedCheckpoint(weights, adapter) if adapter else weights)
    return ours.logits([row(0, ids, 0, len(ids), TABLES[0])])[0]


def mixed_logits(base, adapters, ranks=None):
    """Of the texts side by side: first most of each as a chunk, then one token of each."""
    slots = Recording(base, ranks)
    ours = Ours(base, ranks=ranks, adapters=slots)
    assert [slots.load(number, directory) for number, directory in enumerate(adapters, 1)] == [None, None]
    # The first text is a token ahead in the middle: single tokens and chunks, of one adapter and of others.
    ends = ((13, 13, 13, 13), (14, 19, 19, 18), (20, 20, 20, 20))
    got = [[] for _ in TEXTS]
    done = (0, 0, 0, 0)
    for until in ends:
        rows = [row(i, ids, done[i], until[i], TABLES[i]) for i, ids in enumerate(TEXTS)]
        for i, logits in enumerate(ours.logits(rows, WHOSE)):
            got[i].append(logits)
        done = until
    return [torch.cat(parts) for parts in got]


@pytest.mark.models
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_mixed_batches_equal_merged_models(case, size, tmp_path):
    base = saved_base(case, tmp_path)
    adapters = two_adapters(base, tmp_path)
    got = on_ranks(size, lambda ranks: mixed_logits(base, adapters, ranks))
    plain = merged_logits(base, None, TEXTS[0])
    for ids, whose, logits in zip(TEXTS, WHOSE, got, strict=True):
        want = merged_logits(base, adapters[whose - 1] if whose else None, ids)
        assert worst_difference(logits, want) < 1e-5
    assert worst_difference(got[0], plain) > 1e-3  # the adapter does something


def loaded(tmp_path, **limits):
    base = saved_base("llama", tmp_path)
    slots = Recording(base, **limits)
    return slots, Ours(base, adapters=slots)


def test_a_batch_that_is_one_adapters_alone_and_one_that_is_nobodys(tmp_path):
    slots, ours = loaded(tmp_path)
    adapter = save_adapter(tmp_path / "adapter", drawn(shapes(slots), 1))
    assert slots.load(7, adapter) is None
    whole = [row(0, TEXTS[0], 0, 20, TABLES[0])]
    for number, directory in ((7, adapter), (0, None), (7, adapter)):
        want = merged_logits(tmp_path / "base", directory, TEXTS[0])
        assert worst_difference(ours.logits(whole, [number])[0], want) < 1e-5


def test_what_is_reserved_is_what_the_largest_adapters_take(tmp_path):
    slots, _ = loaded(tmp_path, count=3, max_rank=5)
    slots.load_blank()
    (layers,) = slots._loaded.values()
    assert slots.reserved_bytes == 3 * sum(lora.down.nbytes + lora.up.nbytes for lora in layers.values())


def test_a_blank_adapter_changes_nothing(tmp_path):
    slots, ours = loaded(tmp_path)
    whole = [row(0, TEXTS[0], 0, 20, TABLES[0])]
    assert torch.equal(ours.logits(whole, [slots.load_blank()])[0], ours.logits(whole, [0])[0])


def test_a_dropped_adapter_makes_room(tmp_path):
    slots, _ = loaded(tmp_path, count=1)
    adapter = save_adapter(tmp_path / "adapter", drawn(shapes(slots), 1))
    assert slots.load(1, adapter) is None
    assert slots.load(2, adapter) == "there is room for 1 adapters"
    slots.drop(1)
    assert slots.load(2, adapter) is None


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({f"{Q}.lora_A.weight": (5, 64), f"{Q}.lora_B.weight": (64, 5)}, r"rank 5 at .*--max-lora-rank is 4"),
        ({f"{Q}.lora_A.weight": (2, 63), f"{Q}.lora_B.weight": (64, 2)}, "do not fit the base's"),
        ({f"{Q}.weight": (64, 64)}, "holds .* whole, which a running model has once: merge it"),
        (
            {"lm_head.lora_A.weight": (2, 64), "lm_head.lora_B.weight": (131, 2)},
            "lm_head.weight, which a running model keeps as it is: merge it",
        ),
        ({"model.layers.9.x.lora_A.weight": (2, 64)}, "which the base model's weights do not hold"),
        ({"model.layers.0." + "x" * 999 + ".lora_A.weight": (2, 64)}, "^.{300}$"),
    ],
)
def test_what_cannot_be_applied_is_refused_and_leaves_nothing(tmp_path, tensors, words):
    slots, _ = loaded(tmp_path, count=1)
    adapter = save_adapter(tmp_path / "adapter", {PREFIX + name: torch.ones(shape) for name, shape in tensors.items()})
    refusal = slots.load(1, adapter)
    assert re.search(words, refusal)
    assert str(tmp_path) not in refusal
    assert slots.load(2, save_adapter(tmp_path / "good", drawn(shapes(slots), 1))) is None


@pytest.mark.parametrize(
    ("value", "alpha", "words"),
    [
        (math.nan, 1, "not finite in torch.float32"),
        (math.inf, 1, "not finite in torch.float32"),
        (1e25, 1e25, "not finite in torch.float32"),
        (torch.complex(torch.tensor(1.0), torch.tensor(2.0)).item(), 1, "not floating point"),
    ],
)
def test_what_is_no_finite_number_is_refused(tmp_path, value, alpha, words):
    slots, _ = loaded(tmp_path)
    dtype = torch.complex64 if isinstance(value, complex) else torch.float32
    shapes = {f"{PREFIX}{Q}.lora_A.weight": (2, 64), f"{PREFIX}{Q}.lora_B.weight": (64, 2)}
    tensors = {name: torch.full(shape, value, dtype=dtype) for name, shape in shapes.items()}
    assert re.search(words, slots.load(1, save_adapter(tmp_path / "adapter", tensors, lora_alpha=alpha)))


@pytest.mark.parametrize("quoted", ["\ud800", "x" * 1000])
def test_a_refusal_is_a_text_that_can_be_sent_whatever_it_quotes(tmp_path, monkeypatch, quoted):
    def refuse(*_):
        raise ModelError(f"the adapter has {quoted}")

    slots, _ = loaded(tmp_path)
    monkeypatch.setattr("serving.layers.lora.AdapterFile", refuse)
    refusal = slots.load(1, tmp_path)
    assert refusal.encode().startswith(b"the adapter has ")
    assert len(refusal) <= 300


def test_ranks_agree_on_a_refusal(tmp_path):
    base = saved_base("llama", tmp_path)

    def load(ranks):
        slots = Recording(base, ranks)
        Ours(base, ranks=ranks, adapters=slots)
        directory = save_adapter(tmp_path / f"adapter{ranks.rank}", drawn(shapes(slots), 1))
        if ranks.rank == 1:
            Path(directory, "adapter_model.safetensors").write_bytes(b"short")
        return slots.load(1, directory), len(slots._loaded)

    assert on_ranks(2, load) == ("another rank cannot load the adapter", 0)
