"""Our models from files that transformers saved, fed rows by hand instead of by a scheduler."""

import torch

from serving.layers.attention.kv_cache import KVCache
from serving.layers.attention.select import fastest
from serving.layers.attention.select import select as select_attention
from serving.layers.builder import LayerBuilder
from serving.layers.lora import Span
from serving.models.select import select as select_model
from serving.plan import NewRow, Row
from serving.protocol import SamplingParams
from serving.runner.encoder import EncoderStates
from serving.runner.inputs import InputBuilder
from serving.weights.checkpoint import SafetensorsCheckpoint
from serving.weights.model_config import ModelConfig

BLOCK = 4
CPU = torch.device("cpu")


class Ours:
    """Our model from the files that transformers saved, fed rows by hand."""

    def __init__(self, directory, dtype=torch.float32, device=CPU, weights=None, ranks=None, adapters=None):
        self.config = ModelConfig.load(directory)
        self.weights = weights or SafetensorsCheckpoint(directory)
        attention = select_attention(fastest(device, dtype))
        build = LayerBuilder(
            self.weights, dtype=dtype, device=device, attention=attention, ranks=ranks, adapters=adapters
        )
        self.model = select_model(self.config, directory)(self.config, build)
        cache = KVCache(build.built.kv_shapes, 128, BLOCK, dtype, device)
        self.built = build.built
        self.inputs = InputBuilder(cache, BLOCK, build.built.reads, dtype, device, build.built.token_reads)
        self.adapters = adapters
        self.texts = None
        if build.built.cross_shapes:
            self.texts = EncoderStates(
                self.model, build.built, slots=range(8), longest=50, at_once=64, block_size=BLOCK, dtype=dtype,
                device=device,
            )  # fmt: skip

    @torch.inference_mode()
    def read(self, texts):
        """Begin rows of an encoder-decoder: the texts to read, by row."""
        self.texts.start(
            NewRow(sequence_id=i, token_ids=[0], prompt_length=1, sampling=SamplingParams(), encoder_token_ids=ids)
            for i, ids in texts.items()
        )

    @torch.inference_mode()
    def logits(self, rows, numbers=()):
        """Every computed token's logits, row by row; `numbers` are those of the rows' adapters."""
        inputs = self.texts.build(self.inputs, rows) if self.texts else self.inputs.build(rows, numbers or None)
        if self.adapters is not None:
            self.adapters.use(Span(numbers[i], inputs.starts[i], len(rows[i].token_ids)) for i in inputs.order)
        logits = self.model.logits(self.model(inputs.batch)).cpu()
        return [logits[start : start + len(row.token_ids)] for start, row in zip(inputs.starts, rows, strict=True)]


def row(i, ids, start, end, table):
    return Row(sequence_id=i, token_ids=ids[start:end], position=start, block_table=table, sample=True)


def worst_difference(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()
