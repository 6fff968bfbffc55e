"""The bodies of `/v1/completions`, as TGI and OpenAI read and write them, in the order of their keys.

Knows no rule on values: those are the validator's.
"""

from msgspec import UNSET, Struct, UnsetType
from pydantic import field_validator

from serving.api.schemas.grammar import ResponseFormat
from serving.api.schemas.openai import StreamOptions, Usage
from serving.api.schemas.strict import F32, U32, U64, Array, StrictModel
from serving.validation.parameters import Parameters


class CompletionRequest(StrictModel):
    """The body of `/v1/completions`."""

    prompt: str | Array[str] | Array[U32] | Array[Array[U32]]
    model: str | None = None
    max_tokens: U32 | None = None
    temperature: F32 | None = None
    top_p: F32 | None = None
    n: U32 | None = None
    best_of: U32 | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: U32 | None = None
    echo: bool | None = None
    stop: str | Array[str] | None = None
    seed: U64 | None = None
    suffix: str | None = None
    repetition_penalty: F32 | None = None
    frequency_penalty: F32 | None = None
    presence_penalty: F32 | None = None
    logit_bias: dict[str, F32] | Array[F32] | None = None
    response_format: ResponseFormat | None = None
    min_p: F32 | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Array[U32] | None = None
    include_stop_str_in_output: bool | None = None

    @field_validator("prompt")
    @classmethod
    def _asks_something(
        cls, prompt: str | list[str] | list[int] | list[list[int]]
    ) -> str | list[str] | list[int] | list[list[int]]:
        if prompt == []:
            raise ValueError("Empty array detected. Do not use an empty array for the prompt.")
        return prompt

    @property
    def choices_per_prompt(self) -> int:
        """How many answers are given to each prompt."""
        return 1 if self.n is None else self.n

    @property
    def only_echoes(self) -> bool:
        """Whether nothing is to be added to the prompts, as when only their log probabilities are of interest."""
        return bool(self.echo) and self.max_tokens == 0

    def prompts(self) -> list[str | list[int]]:
        """The texts, or lists of token ids, one by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        texts = [item for item in self.prompt if isinstance(item, str)]
        lists = [item for item in self.prompt if isinstance(item, list)]
        return [*texts, *lists] or [[item for item in self.prompt if isinstance(item, int)]]

    def checked_later(self) -> Parameters:
        """The same for the validator. Tokens are drawn unless the temperature is 0; TGI's list of biases is void."""
        greedy = self.temperature == 0
        return Parameters(
            n=self.choices_per_prompt,
            best_of=self.best_of,
            do_sample=not greedy,
            temperature=None if greedy else self.temperature,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias=self.logit_bias if isinstance(self.logit_bias, dict) else {},
            top_p=None if greedy else self.top_p,
            min_p=None if greedy else self.min_p,
            max_new_tokens=1 if self.only_echoes else self.max_tokens,  # a prompt alone is no generation
            stop=[self.stop] if isinstance(self.stop, str) else self.stop or (),
            stop_token_ids=self.stop_token_ids or (),
            ignore_eos=bool(self.ignore_eos),
            keep_stop_text=bool(self.include_stop_str_in_output),
            seed=self.seed,
            suffix=self.suffix,
            top_n_tokens=self.logprobs,
            prompt_logprobs=bool(self.echo) and self.logprobs is not None,
            grammar=None if self.response_format is None else self.response_format.as_grammar(),
        )


class CompletionLogprobs(Struct, frozen=True):
    """The tokens of a text, in the shape of OpenAI's older route.

    Attributes:
        token_logprobs: None for a prompt's first token.
        top_logprobs: by the tokens' texts, the chosen one's among them; None for a prompt's token, and altogether
            unless alternatives were asked for.
        text_offset: characters of the text before each token.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None] | None] | None
    text_offset: list[int]


class CompletionChoice(Struct, frozen=True):
    """One of the answers."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class Completion(Struct, frozen=True, kw_only=True):
    """The answer to prompts."""

    object: str = "text_completion"
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(Struct, frozen=True, kw_only=True):
    """An event of a streamed answer."""

    object: str = "text_completion"
    id: str
    created: int
    choices: list[CompletionChoice]
    model: str
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET
