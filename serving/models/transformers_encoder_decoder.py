"""Any other encoder-decoder of transformers whose class takes an attention function, on our caches.

For classes whose encoder and decoder look their positions up in a table: they count them from a cache that we do not
have, so the table is asked in their stead. Knows no class of them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from serving.layers.attention.backend import Attention
from serving.layers.attention.cross import CrossAttention
from serving.layers.builder import LayerBuilder
from serving.layers.forward_batch import ForwardBatch
from serving.models.select import FOREIGN_FAILURES
from serving.models.transformers_seam import (
    RECORDED_TOKENS,
    Attend,
    Recorded,
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

_TEXT_TOKENS = 5
_POSITIONS = "embed_positions"


class TransformersEncoderDecoder(nn.Module):
    """An `EncoderDecoder`: a class of transformers between our batches and our attention.

    Args:
        model: the class's own model with its weights.
        build: makes the attention layers, in the order in which the class calls them.
        longest: positions of either text.

    Raises:
        ModelError: something about the class is not served; the text says what.
    """

    def __init__(self, model: PreTrainedModel, build: LayerBuilder, longest: int) -> None:
        super().__init__()
        self.model, self.dtype, self.seam = model, model.dtype, Seam()
        self.encoder, self.decoder = model.get_encoder(), model.get_decoder()
        # Some classes give padding no position.
        token = 1 if model.config.pad_token_id == 0 else 0
        ids = torch.full((1, RECORDED_TOKENS), token, device=model.device)
        reader, writer = Recorder(ahead=True), Recorder(text=_TEXT_TOKENS)
        encoded = record(model, self.seam, reader, lambda: self.encoder(input_ids=ids)[0])
        text = encoded.new_zeros(1, _TEXT_TOKENS, encoded.shape[-1])
        record(
            model, self.seam, writer,
            lambda: self.decoder(input_ids=ids, encoder_hidden_states=text, use_cache=False)[0],
        )  # fmt: skip
        if not writer.crosses:
            raise refused(model.config.model_type, "its decoder does not look at what its encoder makes of a text")
        self.attends: dict[nn.Module, Attention] = {
            module: build.encoder_attention(**_looking_everywhere(layer)) for module, layer in reader.layers.items()
        }
        for module, layer in writer.layers.items():
            self.attends[module] = build.attention(**asdict(layer))
        self.crosses: dict[nn.Module, CrossAttention] = {
            module: build.cross_attention(**_looking_everywhere(layer)) for module, layer in writer.crosses.items()
        }
        ids = torch.full((1, longest), token, device=model.device)
        for side, rest in ((self.encoder, {}), (self.decoder, {"encoder_hidden_states": text, "use_cache": False})):
            setattr(side, _POSITIONS, _Positions(side, self.seam, {"input_ids": ids, **rest}))
        self.head = head_of(model)
        # A text that is there and says nothing: the class looks whether there is one.
        self.text = text[:, :1]
        self.cache = EncoderDecoderCache(_Passing(), DynamicCache())
        for i in range(len(self.crosses)):
            self.cache.cross_attention_cache.update(self.text[None], self.text[None], i)
            self.cache.is_updated[i] = True
        model.set_attn_implementation(self.seam.serving)

    def encode(self, batch: ForwardBatch) -> Iterable[tuple[Tensor, Tensor]]:
        """See `EncoderDecoder`. A decoder's forward of one token shows what its layers make of the texts."""
        found: dict[nn.Module, tuple[Tensor, Tensor]] = {}

        def note(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, said: Mapping[str, Any]
        ) -> Tensor:
            if module in self.crosses:
                size = query.shape[-1]
                found[module] = as_rows(key, size, self.dtype), as_rows(value, size, self.dtype)
            return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1])

        with self.seam.attending(self._attend(batch), batch.positions):
            encoded = self.encoder(input_ids=batch.input_ids[None])[0]
        with self.seam.attending(note, batch.positions[:1]):
            self.decoder(input_ids=batch.input_ids[None, :1], encoder_hidden_states=encoded, use_cache=False)
        return [found[module] for module in self.crosses]

    def forward(self, batch: ForwardBatch) -> Tensor:
        """The last hidden state of every token: [tokens, hidden]."""
        with self.seam.attending(self._attend(batch), batch.positions):
            computed = self.decoder(
                input_ids=batch.input_ids[None], encoder_hidden_states=self.text, past_key_values=self.cache,
                use_cache=True,
            )  # fmt: skip
        return computed[0][0]

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, vocabulary], in float32."""
        return self.head(inputs_embeds=hidden[None], use_cache=False).logits[0].float()

    def oracle(self, token_ids: Tensor, text: Tensor | None) -> Tensor:
        """See `HasOracle`."""
        assert text is not None
        return own_logits(self.model, self.seam, {"input_ids": text[None], "decoder_input_ids": token_ids[None]})

    def _attend(self, batch: ForwardBatch) -> Attend:
        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, said: Mapping[str, Any]
        ) -> Tensor:
            size = query.shape[-1]
            rows = as_rows(query, size, self.dtype)
            if module not in self.crosses:
                own = as_rows(key, size, self.dtype), as_rows(value, size, self.dtype)
                return as_attended(self.attends[module](rows, *own, batch), query, value.shape[-1])
            assert batch.cross is not None
            return as_attended(self.crosses[module](rows, batch.cross), query, size)

        return attend


class _Passing(DynamicCache):  # type: ignore[misc]
    """Keeps nothing: what stands in a cache's place where a class has to be given one."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """The same keys and values."""
        return key_states, value_states


class _Positions(nn.Module):
    """Stands where a class has its table of positions, which it asks itself only where it computes by itself.

    Args:
        side: the encoder or the decoder.
        inputs: of a forward of that side over the longest text. It ends where positions are looked up.

    Raises ModelError where the class has no such table, or one that is too short.
    """

    table: Tensor

    def __init__(self, side: PreTrainedModel, seam: Seam, inputs: Mapping[str, Any]) -> None:
        super().__init__()
        own, longest = getattr(side, _POSITIONS, None), inputs["input_ids"].shape[1]
        if not isinstance(own, nn.Module):
            raise refused(side.config.model_type, "its positions are not looked up in a table")
        self.own, self._seam = own, seam
        setattr(side, _POSITIONS, _Asked(own))
        try:
            with torch.inference_mode():
                side(**inputs)
        except _Told as told:
            table = told.table.reshape(-1, told.table.shape[-1])
        except FOREIGN_FAILURES as error:
            raise refused(side.config.model_type, f"it has no {longest} positions: {line_of(error)}") from error
        else:
            raise refused(side.config.model_type, "it does not use its table of positions")
        if len(table) != longest:
            raise refused(side.config.model_type, f"it has {len(table)} positions instead of {longest}")
        self.register_buffer("table", table.clone(), persistent=False)

    def forward(self, *args: Any, **said: Any) -> Tensor:
        """[1, tokens, hidden] of a serving step; what the class asks for where it counts by itself."""
        if self._seam.positions is None:
            own: Tensor = self.own(*args, **said)
            return own
        return self.table[self._seam.positions][None]


class _Asked(nn.Module):
    """Ends a forward with the positions that it has looked up."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(self, *args: Any, **said: Any) -> NoReturn:
        """Raises _Told."""
        raise _Told(self.own(*args, **said))


class _Told(Exception):
    """A whole table of positions."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table


def _looking_everywhere(layer: Recorded) -> dict[str, Any]:
    return {name: value for name, value in asdict(layer).items() if name not in ("window", "softcap")}
