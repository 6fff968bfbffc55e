"""From what a client asks to a `protocol.Request`: rendered, tokenised and held to the rules, each of them once.

Knows no JSON and no HTTP; its calls may take long, so that they run off the hub.
"""

import hashlib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from serving.errors import TemplateError, ValidationError
from serving.grammar.grammars import Grammars
from serving.plan import ModelFacts
from serving.protocol import Grammar, Origin, Request, SamplingParams, StopParams, Watermark
from serving.tokenizer import Tokenizer
from serving.validation.adapters import Adapters
from serving.validation.chat_template import ChatTemplate, Conversation, Message
from serving.validation.parameters import Limits, Parameters, samples_tokens, value_or
from serving.validation.rules import Rules
from serving.validation.tool_syntax import ToolSyntax

TGI_WATERMARK = Watermark(gamma=0.5, delta=2.0)
UNTOLD = Origin()  # of a model in a directory
SMALLEST, LARGEST = 1e-5, 1e5  # of a divisor or factor of logits: beyond, float32 overflows and nothing else changes


@dataclass(frozen=True, slots=True, kw_only=True)
class Validated:
    """A client's request past every check.

    Attributes:
        requests: one for each answer to make.
        seeds: each request's seed if it samples.
        input_length: tokens of the prompt that the requests share.
        text: the prompt's.
    """

    requests: list[Request]
    seeds: list[int | None]
    input_length: int
    text: str

    @property
    def characters(self) -> int:
        """Of the prompt's text."""
        return len(self.text)


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
        grammars: `None` where none can be followed.
        watermark: of the requests that want one.
        decoder_start_token_id: what every answer of an encoder-decoder begins with; `None` for a decoder alone.
        adapters: that requests may name; `None` where there are none.

    Attributes:
        origin: what a hub told of the loaded model.
        tool_syntax: how the model reads and writes about tools.
    """

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None,
        limits: Limits,
        facts: ModelFacts,
        prefill_logprobs: bool,
        grammars: Grammars | None = None,
        watermark: Watermark = TGI_WATERMARK,
        origin: Origin = UNTOLD,
        decoder_start_token_id: int | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        self.limits = limits
        self.facts = facts
        self.origin = origin
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self.tool_syntax = ToolSyntax.of(chat_template, tokenizer)
        self._prefill_logprobs = prefill_logprobs
        self._rules = Rules(
            limits, vocab_size=facts.vocab_size, prefill_logprobs=prefill_logprobs,
            longest_answer=facts.max_decoder_tokens - 1 if facts.max_decoder_tokens else None,
        )  # fmt: skip
        self._grammars = grammars
        self._watermark = watermark
        self._decoder_start = decoder_start_token_id
        self._adapters = Adapters(room=0) if adapters is None else adapters

    def samples(self, parameters: Parameters, *, stream: bool, prompts: int = 1) -> int:
        """As `Rules.samples`."""
        return self._rules.samples(parameters, stream=stream, prompts=prompts)

    def validate(self, prompt: str | Sequence[int], parameters: Parameters) -> Validated:
        """Check a request to go on with a text, or with token ids as they are.

        Raises:
            ValidationError: with the first broken rule.
        """
        if isinstance(prompt, str):
            return self._validate(prompt, parameters, lambda: self._tokenizer.encode(prompt))
        self._rules.check_known(prompt)
        return self._validate(self._tokenizer.decode(prompt), parameters, lambda: list(prompt))

    def validate_chat(self, conversation: Conversation, parameters: Parameters) -> Validated:
        """Check a request to answer a conversation.

        Raises:
            ValidationError: with the first broken rule.
            TemplateError: the model has no chat template, or it refuses the messages.
        """
        text = self._rendered(conversation)
        return self._validate(text, parameters, lambda: self._tokenizer.encode(text, add_special_tokens=False))

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[Piece]:
        """The tokens of `text`, with those that the tokenizer adds unless told not to."""
        encoded = text.encode()
        return [
            Piece(token_id, encoded[start:stop].decode(errors="replace"), start, stop)
            for token_id, start, stop in self._tokenizer.encode_with_offsets(
                text, add_special_tokens=add_special_tokens
            )
        ]

    def tokenize_chat(self, conversation: Conversation) -> tuple[str, list[Piece]]:
        """The text that a conversation becomes, and its tokens.

        Raises:
            ValidationError, TemplateError: as `validate_chat`.
        """
        text = self._rendered(conversation)
        return text, self.tokenize(text, add_special_tokens=False)

    def _rendered(self, conversation: Conversation) -> str:
        _check_modality(conversation.messages)
        if self._chat_template is None:
            raise TemplateError("template not found")
        return self._chat_template.render(conversation)

    def _validate(self, text: str, parameters: Parameters, encode: Callable[[], list[int]]) -> Validated:
        samples = max(parameters.best_of or 1, parameters.n or 1)
        if parameters.prompt_logprobs and self._decoder_start is not None:
            raise ValidationError("`echo` with `logprobs` is not supported: an encoder-decoder only reads its input")
        logit_bias = self._rules.check(text, parameters)
        adapter = self._adapter(parameters.adapter_id)
        token_ids = self._rules.checked_ids(encode(), parameters.truncate)
        max_new_tokens = self._rules.max_new_tokens(len(token_ids), parameters.max_new_tokens)
        if parameters.grammar is not None:
            self._check_grammar(parameters.grammar)
        sampling = self._sampling(parameters, logit_bias)
        stop = StopParams(
            max_new_tokens=max_new_tokens,
            stop_strings=tuple(text for text in parameters.stop if text),  # an empty one would say nothing
            stop_token_ids=tuple(parameters.stop_token_ids),
            ignore_eos=parameters.ignore_eos,
            keep_stop_text=parameters.keep_stop_text,
            shown_token_ids=tuple(parameters.shown_token_ids),
        )
        seed = secrets.randbits(64) if parameters.seed is None else parameters.seed
        seeds = [_derived(seed, sample) for sample in range(samples)]
        return Validated(
            requests=[self._request(token_ids, sampling(seed), stop, adapter) for seed in seeds],
            seeds=[seed if samples_tokens(parameters) else None for seed in seeds],
            input_length=len(token_ids),
            text=text,
        )

    def _request(self, token_ids: list[int], sampling: SamplingParams, stop: StopParams, adapter: int) -> Request:
        """A decoder goes on with the ids; an encoder-decoder reads them and begins an answer of its own."""
        prompt, read = (token_ids, []) if self._decoder_start is None else ([self._decoder_start], token_ids)
        return Request(prompt_token_ids=prompt, encoder_token_ids=read, sampling=sampling, stop=stop, adapter=adapter)

    def _adapter(self, name: str | None) -> int:
        """The number of the adapter that shall answer; the base model answers only where none was named."""
        number = 0 if name is None else self._adapters.number_of(name)
        if number is None:
            raise ValidationError(f"unknown adapter `{(name or '')[:100]}`")
        return number

    @property
    def follows_grammars(self) -> bool:
        """Whether a text can be held to a grammar."""
        return self._grammars is not None

    def _check_grammar(self, grammar: Grammar) -> None:
        if self._grammars is None:
            raise ValidationError("grammar is not supported")
        self._grammars.check(grammar)

    def _sampling(self, given: Parameters, logit_bias: dict[int, float]) -> Callable[[int], SamplingParams]:
        def seeded(seed: int) -> SamplingParams:
            return SamplingParams(
                do_sample=samples_tokens(given),
                seed=seed,
                temperature=_bounded(given.temperature),
                top_k=given.top_k or 0,
                top_p=value_or(given.top_p, 1.0),
                typical_p=value_or(given.typical_p, 1.0),
                min_p=given.min_p or 0.0,
                repetition_penalty=_bounded(given.repetition_penalty),
                relative_frequency_penalty=given.relative_frequency_penalty or 0.0,
                frequency_penalty=given.frequency_penalty or 0.0,
                presence_penalty=given.presence_penalty or 0.0,
                logit_bias=logit_bias,
                top_n_tokens=given.top_n_tokens or 0,
                grammar=given.grammar,
                watermark=self._watermark if given.watermark else None,
                prompt_logprobs=(given.decoder_input_details and self._prefill_logprobs) or given.prompt_logprobs,
            )

        return seeded


def joined(prompts: Sequence[Validated]) -> Validated:
    """The prompts of one request as if they were one, in their order."""
    if len(prompts) == 1:
        return prompts[0]
    return Validated(
        requests=[request for prompt in prompts for request in prompt.requests],
        seeds=[seed for prompt in prompts for seed in prompt.seeds],
        input_length=sum(prompt.input_length for prompt in prompts),
        text="".join(prompt.text for prompt in prompts),
    )


def _bounded(factor: float | None) -> float:
    return 1.0 if factor is None else min(LARGEST, max(SMALLEST, factor))


def _derived(seed: int, sample: int) -> int:
    """The seed of one of several answers; the first one's is the seed itself."""
    if sample == 0:
        return seed
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + sample.to_bytes(8, "little"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def _check_modality(messages: Sequence[Message]) -> None:
    """Raises ValidationError: a part of a message is no text."""
    for message in messages:
        content = message.get("content")
        if isinstance(content, list) and any(part["type"] != "text" for part in content):
            raise ValidationError("image modality is not supported")
