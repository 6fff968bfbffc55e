"""Any other text model of transformers whose class takes an attention function, on our paged cache.

Transformers computes all but attention, with its own layers: no rank, no number format and none of our kernels but
attention's. Importing it costs seconds, so this file is imported for a model alone that has no file of ours.
"""

import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from serving.errors import ModelError
from serving.layers.attention.backend import Attention
from serving.layers.builder import LayerBuilder
from serving.layers.forward_batch import ForwardBatch
from serving.models.select import FOREIGN_FAILURES, CausalModel
from serving.models.transformers_encoder_decoder import TransformersEncoderDecoder
from serving.models.transformers_seam import (
    RECORDED_TOKENS,
    Recorder,
    Seam,
    as_attended,
    as_rows,
    head_of,
    line_of,
    own_logits,
    record,
    refused,
)
from serving.weights.checkpoint import Checkpoint, MissingTensor
from serving.weights.model_config import ModelConfig


class TransformersModel(nn.Module):
    """A class of transformers between our batches and our attention.

    Args:
        model: the class's own model with its weights.
        build: makes the attention layers, in the order in which the class calls them.

    Raises:
        ModelError: something about the class is not served; the text says what.
    """

    def __init__(self, model: PreTrainedModel, build: LayerBuilder) -> None:
        super().__init__()
        self.model, self.dtype, self.seam = model, model.dtype, Seam()
        ids = torch.arange(RECORDED_TOKENS, device=model.device)[None]
        recorder = Recorder()
        record(
            model, self.seam, recorder,
            lambda: model.base_model(input_ids=ids, position_ids=ids, use_cache=False)[0],
        )  # fmt: skip
        self.attends: dict[nn.Module, Attention] = {
            module: build.attention(**asdict(layer)) for module, layer in recorder.layers.items()
        }
        self.head = head_of(model)
        model.set_attn_implementation(self.seam.serving)

    def forward(self, batch: ForwardBatch) -> Tensor:
        """The last hidden state of every token: [tokens, hidden]."""

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, said: Mapping[str, Any]
        ) -> Tensor:
            size = query.shape[-1]
            rows, keys, values = (as_rows(part, size, self.dtype) for part in (query, key, value))
            return as_attended(self.attends[module](rows, keys, values, batch), query, value.shape[-1])

        with self.seam.attending(attend):
            computed = self.model.base_model(
                input_ids=batch.input_ids[None], position_ids=batch.positions[None], use_cache=False
            )
        return computed[0][0]

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, vocabulary], in float32."""
        return self.head(inputs_embeds=hidden[None], use_cache=False).logits[0].float()

    def oracle(self, token_ids: Tensor, text: Tensor | None) -> Tensor:
        """See `HasOracle`."""
        return own_logits(self.model, self.seam, {"input_ids": token_ids[None]})


class TransformersFallback:
    """An `Architecture` for what lies in a directory. Looks at the configuration alone until it is called.

    Args:
        directory: with `config.json`, and where code comes with the model, with that code.
        trust_remote_code: whether such code may run. Nothing else in the tree runs any.

    Raises:
        ModelError: the model cannot be served so; the text says why.
    """

    def __init__(self, directory: Path, trust_remote_code: bool) -> None:
        self._trust_remote_code = trust_remote_code
        self._config = self._read(ModelConfig.load(directory), directory)
        if self._config.get_text_config() is not self._config:
            raise refused(self._config.model_type, "it takes more than text")

    def __call__(self, config: ModelConfig, build: LayerBuilder) -> CausalModel:
        """See `Architecture`."""
        if not self._config.is_encoder_decoder:
            return TransformersModel(build.foreign(self._load), build)
        if config.decoder_start_token_id is None:
            raise refused(config.model_type, "it has an encoder, and its config.json must say `is_encoder_decoder`")
        return TransformersEncoderDecoder(build.foreign(self._load), build, config.max_position_embeddings)

    def _read(self, said: ModelConfig, directory: Path) -> PreTrainedConfig:
        if said.model_type not in CONFIG_MAPPING and not self._trust_remote_code:
            if said.said.get("auto_map"):
                raise ModelError(
                    f"model type {said.model_type!r} comes with code of its own; give --trust-remote-code to run it"
                )
            raise refused(said.model_type, "it does not know it")
        try:
            return AutoConfig.from_pretrained(directory, trust_remote_code=self._trust_remote_code)
        except FOREIGN_FAILURES as error:
            raise refused(said.model_type, f"transformers cannot read it: {line_of(error)}") from error

    def _load(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        logging.disable_progress_bar()  # the checkpoint has its own
        logging.set_verbosity_error()  # what is missing or does not fit is said below
        reader = _Reader(checkpoint)
        stored = {name: _Stored(reader, name) for name in checkpoint.names()}
        try:
            with torch.device("meta"):
                auto = AutoModelForSeq2SeqLM if self._config.is_encoder_decoder else AutoModelForCausalLM
                empty = auto.from_config(self._config, trust_remote_code=self._trust_remote_code)
            model, found = type(empty).from_pretrained(
                None, config=self._config, state_dict=stored, dtype=dtype, output_loading_info=True,
                ignore_mismatched_sizes=True,
            )  # fmt: skip
        except (*FOREIGN_FAILURES, ModelError) as error:
            # Transformers tells of it in its own words, which name no file.
            raise reader.failure or refused(
                self._config.model_type, f"transformers cannot load it: {line_of(error)}"
            ) from error
        for name, stored_shape, wanted_shape in sorted(found["mismatched_keys"]):
            raise ModelError(f"{name} is {list(stored_shape)}, but config.json makes it {list(wanted_shape)}")
        if missing := sorted(found["missing_keys"]):
            raise ModelError(str(MissingTensor(missing)))  # all are named already
        return model.to(device).requires_grad_(False)


class _Reader:
    """The checkpoint for transformers' threads: one at a time, and the first failure is kept."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self._reading = checkpoint, threading.Lock()
        self.failure: ModelError | None = None

    def read(self, name: str) -> Tensor:
        """A tensor's copy: what is read may be a view of the mapped file and change with it."""
        with self._reading:
            try:
                return self._checkpoint.read(name).clone()
            except ModelError as error:
                self.failure = self.failure or error
                raise


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor of the checkpoint, read when transformers takes it."""

    reader: _Reader
    name: str

    def __getitem__(self, index: Any) -> Tensor:
        return self.reader.read(self.name)[index]
