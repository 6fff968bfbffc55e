"""What a request may say of its answers, typed but unchecked, and the bounds that it has to keep.

Knows no rule.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from serving.protocol import Grammar


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The bounds of one request, in counts.

    Attributes:
        max_stop_length: characters of one stop string.
        max_client_batch_size: prompts of one request.
    """

    max_best_of: int
    max_stop_sequences: int
    max_top_n_tokens: int
    max_input_tokens: int
    max_total_tokens: int
    max_stop_length: int = 4096
    max_stop_token_ids: int = 128
    max_logit_bias: int = 1024
    max_client_batch_size: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """How answers shall be made, typed but unchecked; `None` means that the client did not say.

    Attributes:
        best_of: answers to make, the best of which is given, or the `n` best.
        n: answers to give (OpenAI's routes); where it is said, `best_of` has OpenAI's rules instead of TGI's.
        relative_frequency_penalty: the native routes' `frequency_penalty`; see `SamplingParams`.
        logit_bias: by token id in decimal digits.
        grammar: what the answer's text has to be.
        prompt_logprobs: the prompt's log probabilities are needed; unlike `decoder_input_details`, which asks for them
            where there are any.
        suffix: what shall stand behind the answer.
        shown_token_ids: see `StopParams`.
        adapter_id: the name of the LoRA adapter that shall answer.
    """

    best_of: int | None = None
    n: int | None = None
    do_sample: bool = False
    temperature: float | None = None
    repetition_penalty: float | None = None
    relative_frequency_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: Mapping[str, float] = field(default_factory=dict)
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    min_p: float | None = None
    max_new_tokens: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    keep_stop_text: bool = True
    shown_token_ids: Sequence[int] = ()
    truncate: int | None = None
    watermark: bool = False
    decoder_input_details: bool = False
    prompt_logprobs: bool = False
    suffix: str | None = None
    seed: int | None = None
    top_n_tokens: int | None = None
    grammar: Grammar | None = None
    adapter_id: str | None = None


def samples_tokens(given: Parameters) -> bool:
    """Whether tokens are drawn: when asked for, and whenever a parameter is set that only makes sense then."""
    return (
        given.do_sample
        or value_or(given.temperature, 1.0) != 1
        or bool(given.top_k)
        or value_or(given.top_p, 1.0) < 1
        or value_or(given.typical_p, 1.0) < 1
        or bool(given.min_p)
    )


def value_or(value: float | None, default: float) -> float:
    """The value, or where there is none the default."""
    return default if value is None else value
