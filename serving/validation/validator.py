"""What a client may ask: every rule, its words and its order; the result is a `protocol.Request`.

Knows no JSON and no HTTP; its calls may take long, so that they run off the hub.
"""

import hashlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from serving.errors import TemplateError, ValidationError
from serving.plan import ModelFacts
from serving.protocol import Grammar, Request, SamplingParams, StopParams
from serving.tokenizer import Tokenizer
from serving.validation.chat_template import ChatTemplate, Conversation, Message

SMALLEST, LARGEST = 1e-5, 1e5  # of a divisor or factor of logits: beyond, float32 overflows and nothing else changes


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The bounds of one request, in counts.

    Attributes:
        max_stop_length: characters of one stop string.
    """

    max_best_of: int
    max_stop_sequences: int
    max_top_n_tokens: int
    max_input_tokens: int
    max_total_tokens: int
    max_stop_length: int = 4096
    max_stop_token_ids: int = 128
    max_logit_bias: int = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """How answers shall be made, typed but unchecked; `None` means that the client did not say.

    Attributes:
        best_of: answers to make, the best of which is given (native routes).
        n: answers to make and give (OpenAI's routes).
        relative_frequency_penalty: the native routes' `frequency_penalty`; see `SamplingParams`.
        logit_bias: by token id in decimal digits.
        grammar: what the answer's text has to be.
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
    truncate: int | None = None
    watermark: bool = False
    decoder_input_details: bool = False
    seed: int | None = None
    top_n_tokens: int | None = None
    grammar: Grammar | None = None
    adapter_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Validated:
    """A client's request past every check.

    Attributes:
        requests: one for each answer to make.
        seeds: each request's seed if it samples.
        input_length: tokens of the prompt that the requests share.
        characters: of the prompt's text.
    """

    requests: list[Request]
    seeds: list[int | None]
    input_length: int
    characters: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A token of a text; `start` and `stop` are byte offsets, both 0 for a token that the text does not hold."""

    id: int
    text: str
    start: int
    stop: int


class Validator:
    """Holds requests to the rules.

    Args:
        chat_template: `None` for a model that has none.
        facts: of the loaded model.
        prefill_logprobs: whether log probabilities of prompts may be asked for.
    """

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None,
        limits: Limits,
        facts: ModelFacts,
        prefill_logprobs: bool,
    ) -> None:
        self.limits = limits
        self.facts = facts
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._prefill_logprobs = prefill_logprobs

    def samples(self, parameters: Parameters, *, stream: bool) -> int:
        """How many answers have to be made; cheap, to be known before anything is taken for the request.

        Raises:
            ValidationError: more than allowed, or not allowed in a stream.
        """
        best_of, n, most = parameters.best_of, parameters.n, self.limits.max_best_of
        if stream:
            if best_of is not None and best_of != 1:
                raise ValidationError("`best_of` != 1 is not supported when streaming tokens")
            if parameters.decoder_input_details:
                raise ValidationError("`decoder_input_details` == true is not supported when streaming tokens")
        if best_of is not None and best_of > 1:
            if most == 1:
                raise ValidationError("`best_of` != 1 is not allowed for this endpoint")
            if best_of > most:
                raise ValidationError(f"`best_of` must be > 0 and <= {most}. Given: {best_of}")
        if n is not None and not 0 < n <= most:
            raise ValidationError(f"`n` must be > 0 and <= {most}. Given: {n}")
        return max(best_of or 1, n or 1)

    def validate(self, text: str, parameters: Parameters) -> Validated:
        """Check a request to go on with `text`.

        Raises:
            ValidationError: with the first broken rule.
        """
        return self._validate(text, parameters, add_special_tokens=True)

    def validate_chat(self, conversation: Conversation, parameters: Parameters) -> Validated:
        """Check a request to answer a conversation.

        Raises:
            ValidationError: with the first broken rule.
            TemplateError: the model has no chat template, or it refuses the messages.
        """
        flat = [_flattened(message) for message in conversation.messages]
        if self._chat_template is None:
            raise TemplateError("template not found")
        return self._validate(self._chat_template.render(flat), parameters, add_special_tokens=False)

    def tokenize(self, text: str) -> list[Piece]:
        """The tokens of `text`, with those that the tokenizer adds."""
        encoded = text.encode()
        return [
            Piece(token_id, encoded[start:stop].decode(errors="replace"), start, stop)
            for token_id, start, stop in self._tokenizer.encode_with_offsets(text)
        ]

    def _validate(self, text: str, parameters: Parameters, *, add_special_tokens: bool) -> Validated:
        samples = max(parameters.best_of or 1, parameters.n or 1)
        self._check_numbers(parameters)
        self._check_stops(parameters)
        logit_bias = self._logit_bias(parameters.logit_bias)
        if parameters.seed is not None and (parameters.best_of or 1) > 1:
            raise ValidationError("`seed` must not be set when `best_of` > 1")
        self._check_input(text, parameters)
        token_ids = self._token_ids(text, parameters.truncate, add_special_tokens)
        max_new_tokens = self._max_new_tokens(len(token_ids), parameters.max_new_tokens)
        if parameters.grammar is not None:
            raise ValidationError("grammar is not supported")
        sampling = self._sampling(parameters, logit_bias)
        stop = StopParams(
            max_new_tokens=max_new_tokens,
            stop_strings=tuple(text for text in parameters.stop if text),  # an empty one would say nothing
            stop_token_ids=tuple(parameters.stop_token_ids),
            ignore_eos=parameters.ignore_eos,
            keep_stop_text=parameters.keep_stop_text,
        )
        seed = secrets.randbits(64) if parameters.seed is None else parameters.seed
        seeds = [_derived(seed, sample) for sample in range(samples)]
        return Validated(
            requests=[Request(prompt_token_ids=token_ids, sampling=sampling(seed), stop=stop) for seed in seeds],
            seeds=[seed if samples_tokens(parameters) else None for seed in seeds],
            input_length=len(token_ids),
            characters=len(text),
        )

    def _check_numbers(self, given: Parameters) -> None:
        warped = (given.temperature, given.top_k, given.top_p, given.typical_p)
        if (given.best_of or 1) > 1 and not given.do_sample and all(value is None for value in warped):
            raise ValidationError("you must use sampling when `best_of` is > 1")
        _check(given.temperature, lambda value: value > 0, "`temperature` must be strictly positive")
        _check(given.repetition_penalty, lambda value: value > 0, "`repetition_penalty` must be strictly positive")
        for penalty in (given.relative_frequency_penalty, given.frequency_penalty):
            _check(penalty, lambda value: -2 <= value <= 2, "`frequency_penalty` must be >= -2.0 and <= 2.0")
        _check(given.top_p, lambda value: 0 < value <= 1, "`top_p` must be > 0.0 and < 1.0")
        _check(given.typical_p, lambda value: 0 < value <= 1, "`typical_p` must be > 0.0 and < 1.0")
        _check(given.top_k, lambda value: value > 0, "`top_k` must be strictly positive")
        _check(given.max_new_tokens, lambda value: value > 0, "`max_new_tokens` must be strictly positive")
        _check(
            given.presence_penalty,
            lambda value: -2 <= value <= 2,
            "`presence_penalty` must be >= -2.0 and <= 2.0",
        )
        _check(given.min_p, lambda value: 0 <= value <= 1, "`min_p` must be >= 0.0 and <= 1.0")

    def _check_stops(self, given: Parameters) -> None:
        limits, count = self.limits, len(given.stop)
        if count > limits.max_stop_sequences:
            raise ValidationError(f"`stop` supports up to {limits.max_stop_sequences} stop sequences. Given: {count}")
        if any(len(text) > limits.max_stop_length for text in given.stop):
            raise ValidationError(f"`stop` sequences must have at most {limits.max_stop_length} characters")
        if len(given.stop_token_ids) > limits.max_stop_token_ids:
            raise ValidationError(f"`stop_token_ids` must have at most {limits.max_stop_token_ids} entries")
        if any(token_id >= self.facts.vocab_size for token_id in given.stop_token_ids):
            raise ValidationError(f"`stop_token_ids` must be < {self.facts.vocab_size}")

    def _logit_bias(self, given: Mapping[str, float]) -> dict[int, float]:
        if len(given) > self.limits.max_logit_bias:
            raise ValidationError(f"`logit_bias` must have at most {self.limits.max_logit_bias} entries")
        bias: dict[int, float] = {}
        for name, value in given.items():
            if not (name.isascii() and name.isdigit() and len(name) <= 10 and int(name) < self.facts.vocab_size):
                raise ValidationError(f"`logit_bias` keys must be token ids < {self.facts.vocab_size}")
            if not -100 <= value <= 100:
                raise ValidationError("`logit_bias` values must be >= -100.0 and <= 100.0")
            bias[int(name)] = value
        return bias

    def _check_input(self, text: str, given: Parameters) -> None:
        limits = self.limits
        if given.top_n_tokens is not None and given.top_n_tokens > limits.max_top_n_tokens:
            raise ValidationError(
                f"`top_n_tokens` must be >= 0 and <= {limits.max_top_n_tokens}. Given: {given.top_n_tokens}"
            )
        if not text:
            raise ValidationError("`inputs` cannot be empty")
        if given.truncate is not None and not 0 < given.truncate <= limits.max_input_tokens:
            raise ValidationError(
                f"`truncate` must be strictly positive and less than {limits.max_input_tokens}. Given: {given.truncate}"
            )
        if given.watermark:
            raise ValidationError("`watermark` is not supported yet")
        if given.adapter_id is not None:
            raise ValidationError(f"unknown adapter `{given.adapter_id[:100]}`")

    def _token_ids(self, text: str, truncate: int | None, add_special_tokens: bool) -> list[int]:
        token_ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        if truncate is not None:
            token_ids = token_ids[-truncate:]
        if not token_ids:
            raise ValidationError("`inputs` cannot be empty")
        if max(token_ids) >= self.facts.vocab_size:
            raise ValidationError("`inputs` contains a token that the model does not know")
        return token_ids

    def _max_new_tokens(self, input_length: int, given: int | None) -> int:
        limits = self.limits
        most = max(0, limits.max_total_tokens - input_length)
        max_new_tokens = most if given is None else given
        if input_length + max_new_tokens > limits.max_total_tokens:
            raise ValidationError(
                f"`inputs` tokens + `max_new_tokens` must be <= {limits.max_total_tokens}. "
                f"Given: {input_length} `inputs` tokens and {max_new_tokens} `max_new_tokens`"
            )
        if input_length > limits.max_input_tokens:
            raise ValidationError(
                f"`inputs` must have less than {limits.max_input_tokens} tokens. Given: {input_length}"
            )
        return max_new_tokens

    def _sampling(self, given: Parameters, logit_bias: dict[int, float]) -> Callable[[int], SamplingParams]:
        def seeded(seed: int) -> SamplingParams:
            return SamplingParams(
                do_sample=samples_tokens(given),
                seed=seed,
                temperature=_bounded(given.temperature),
                top_k=given.top_k or 0,
                top_p=_or(given.top_p, 1.0),
                typical_p=_or(given.typical_p, 1.0),
                min_p=given.min_p or 0.0,
                repetition_penalty=_bounded(given.repetition_penalty),
                relative_frequency_penalty=given.relative_frequency_penalty or 0.0,
                frequency_penalty=given.frequency_penalty or 0.0,
                presence_penalty=given.presence_penalty or 0.0,
                logit_bias=logit_bias,
                top_n_tokens=given.top_n_tokens or 0,
                prompt_logprobs=given.decoder_input_details and self._prefill_logprobs,
            )

        return seeded


def samples_tokens(given: Parameters) -> bool:
    """Whether tokens are drawn: when asked for, and whenever a parameter is set that only makes sense then."""
    return (
        given.do_sample
        or _or(given.temperature, 1.0) != 1
        or bool(given.top_k)
        or _or(given.top_p, 1.0) < 1
        or _or(given.typical_p, 1.0) < 1
        or bool(given.min_p)
    )


def _check(value: float | None, holds: Callable[[float], bool], detail: str) -> None:
    if value is not None and not holds(value):
        raise ValidationError(detail)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _bounded(factor: float | None) -> float:
    return 1.0 if factor is None else min(LARGEST, max(SMALLEST, factor))


def _derived(seed: int, sample: int) -> int:
    """The seed of one of several answers; the first one's is the seed itself."""
    if sample == 0:
        return seed
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + sample.to_bytes(8, "little"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def _flattened(message: Message) -> Message:
    """The message with its parts joined to one text.

    Raises:
        ValidationError: a part is no text.
    """
    content = message.get("content")
    if isinstance(content, str):
        return message
    parts = content or []
    if any(part["type"] != "text" for part in parts):
        raise ValidationError("image modality is not supported")
    return {**message, "content": "".join(part["text"] for part in parts)}
