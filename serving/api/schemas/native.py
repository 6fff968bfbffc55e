"""TGI's own bodies: what is asked of `/generate` and its sisters, and what they answer, in the order of their keys.

Knows no rule on values: those are the validator's.
"""

from msgspec import UNSET, Struct, UnsetType
from pydantic import Field

from serving.api.schemas.float32 import shortest
from serving.api.schemas.grammar import TGIGrammar
from serving.api.schemas.strict import F32, I32, U32, U64, Array, StrictModel
from serving.protocol import FinishReason, OutputToken, TokenLogprob
from serving.validation.parameters import Parameters


class GenerateParameters(StrictModel):
    """The `parameters` of a request."""

    best_of: U64 | None = None
    temperature: F32 | None = None
    repetition_penalty: F32 | None = None
    frequency_penalty: F32 | None = None
    top_k: I32 | None = None
    top_p: F32 | None = None
    typical_p: F32 | None = None
    do_sample: bool = False
    max_new_tokens: U32 | None = None
    return_full_text: bool | None = None
    stop: Array[str] = Field(default_factory=list)
    truncate: U64 | None = None
    watermark: bool = False
    details: bool = False
    decoder_input_details: bool = False
    seed: U64 | None = None
    top_n_tokens: U32 | None = None
    grammar: TGIGrammar | None = None
    adapter_id: str | None = None
    min_p: F32 | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Array[U32] | None = None
    include_stop_str_in_output: bool | None = None

    def checked_later(self) -> Parameters:
        """The same for the validator."""
        return Parameters(
            best_of=self.best_of,
            do_sample=self.do_sample,
            temperature=self.temperature,
            repetition_penalty=self.repetition_penalty,
            relative_frequency_penalty=self.frequency_penalty,
            top_k=self.top_k,
            top_p=self.top_p,
            typical_p=self.typical_p,
            min_p=self.min_p,
            max_new_tokens=self.max_new_tokens,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids or (),
            ignore_eos=bool(self.ignore_eos),
            keep_stop_text=self.include_stop_str_in_output is not False,
            truncate=self.truncate,
            watermark=self.watermark,
            decoder_input_details=self.decoder_input_details,
            seed=self.seed,
            top_n_tokens=self.top_n_tokens,
            grammar=None if self.grammar is None else self.grammar.as_grammar(),
            adapter_id=self.adapter_id,
        )


class GenerateRequest(StrictModel):
    """The body of `/generate`, `/generate_stream` and `/tokenize`.

    Without `parameters` tokens are drawn; with them, even empty ones, `do_sample` says.
    """

    inputs: str
    parameters: GenerateParameters = Field(default_factory=lambda: GenerateParameters(do_sample=True))


class CompatGenerateRequest(GenerateRequest):
    """The body of `/`."""

    stream: bool = False


class PrefillToken(Struct, frozen=True):
    """A token of the prompt."""

    id: int
    text: str
    logprob: float | None


class Token(Struct, frozen=True):
    """A token of the answer."""

    id: int
    text: str
    logprob: float | None
    special: bool


class BestOfSequence(Struct, frozen=True):
    """An answer that was not the best."""

    generated_text: str
    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    top_tokens: list[list[Token]] | UnsetType = UNSET


class Details(Struct, frozen=True):
    """How an answer came about."""

    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    best_of_sequences: list[BestOfSequence] | UnsetType = UNSET
    top_tokens: list[list[Token]] | UnsetType = UNSET


class GenerateResponse(Struct, frozen=True):
    """The answer of `/generate`."""

    generated_text: str
    details: Details | UnsetType = UNSET


class StreamDetails(Struct, frozen=True):
    """How a streamed answer came about."""

    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    input_length: int


class StreamResponse(Struct, frozen=True):
    """An event of `/generate_stream`."""

    index: int
    token: Token
    top_tokens: list[Token] | UnsetType
    generated_text: str | None
    details: StreamDetails | None


class TokenizePiece(Struct, frozen=True):
    """A token of `/tokenize`'s answer."""

    id: int
    text: str
    start: int
    stop: int


class ChatTokenizeResponse(Struct, frozen=True):
    """The answer of `/chat_tokenize`."""

    tokenize_response: list[TokenizePiece]
    templated_text: str


class Info(Struct, frozen=True, kw_only=True):
    """The answer of `/info`: TGI's keys, then ours."""

    model_id: str
    model_sha: str | None
    model_pipeline_tag: str | None
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    validation_workers: int
    max_client_batch_size: int
    router: str
    version: str
    sha: str | None
    docker_label: str | None
    model_dtype: str
    model_device_type: str
    max_batch_size: int
    max_batch_prefill_tokens: int
    max_batch_total_tokens: int
    max_position_embeddings: int
    num_shard: int
    weight_bytes: int
    kv_cache_bytes: int


class ErrorBody(Struct, frozen=True):
    """What went wrong."""

    error: str
    error_type: str


def token(generated: OutputToken | TokenLogprob) -> Token:
    """A generated token, or an alternative, as the wire shows it."""
    return Token(generated.id, generated.text, shortest(generated.logprob), generated.special)


def prefill_token(known: TokenLogprob) -> PrefillToken:
    """A prompt's token as the wire shows it."""
    return PrefillToken(known.id, known.text, shortest(known.logprob))
