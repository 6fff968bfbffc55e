"""What crosses the bridge between HTTP and the engine: requests down, outputs up.

Knows no tensor, no thread and no dialect of HTTP; every record is frozen.
"""

import enum

from msgspec import Struct


class FinishReason(enum.StrEnum):
    """Why a generation ended, in the words of TGI's wire."""

    LENGTH = "length"
    EOS_TOKEN = "eos_token"
    STOP_SEQUENCE = "stop_sequence"


class GrammarKind(enum.StrEnum):
    """The languages in which a grammar can be written."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"


class Grammar(Struct, frozen=True, array_like=True):
    """What a text has to be; it crosses as text and is compiled where it is used."""

    kind: GrammarKind
    source: str


class Watermark(Struct, frozen=True, array_like=True):
    """How strongly a text is marked as generated: `delta` is added to the logits of the share `gamma` of all ids."""

    gamma: float
    delta: float


class SamplingParams(Struct, frozen=True, kw_only=True, array_like=True):
    """How one sequence's tokens are chosen; every default means "off".

    The order of the processors is TGI's: watermark, logit bias, repetition penalty, frequency and presence
    penalties, grammar, temperature, top_k, top_p, min_p, typical_p. Without `do_sample` the choice is the argmax.

    Attributes:
        do_sample: draw instead of taking the argmax.
        seed: 64-bit; with the position and the token id it determines every draw.
        relative_frequency_penalty: TGI's definition: `penalty * count / length`, over prompt and output.
        frequency_penalty: OpenAI's definition: `penalty * count`, over the output.
        presence_penalty: OpenAI's definition: `penalty` once for every id in the output.
        logit_bias: added to the logits of single ids.
        top_n_tokens: how many of the best alternatives to report a token (ties can give more).
        prompt_logprobs: also report the log probability of every prompt token after the first.
        grammar: what the generated text has to be.
        watermark: how it is marked, if it is.
    """

    do_sample: bool = False
    seed: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    typical_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    relative_frequency_penalty: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    top_n_tokens: int = 0
    prompt_logprobs: bool = False
    grammar: Grammar | None = None
    watermark: Watermark | None = None


class StopParams(Struct, frozen=True, kw_only=True):
    """When one sequence ends.

    Attributes:
        max_new_tokens: exact upper bound of generated tokens.
        stop_strings: end where one of these texts is complete, wherever in a token that is.
        stop_token_ids: end at one of these ids as if it were an end-of-sequence token.
        ignore_eos: go on over the model's end-of-sequence tokens; not under a grammar, where nothing can follow.
        keep_stop_text: whether a matched stop string stays in the text (native routes) or is removed (OpenAI's).
        shown_token_ids: special tokens that belong to the text nevertheless.
    """

    max_new_tokens: int
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    keep_stop_text: bool = True
    shown_token_ids: tuple[int, ...] = ()


class Session(Struct, frozen=True):
    """A client's sticky session: what its last request computed is kept for its next one, as far as there is room.

    Attributes:
        id: unique among the sessions of one `cache_salt`.
        expires: seconds of `time.monotonic()`.
    """

    id: str
    expires: float


class Request(Struct, frozen=True, kw_only=True):
    """What a client asked, validated: past this type nothing is checked again.

    Attributes:
        prompt_token_ids: at least one id, all inside the vocabulary; what the answer goes on from.
        encoder_token_ids: the text that an encoder-decoder answers, all ids inside the vocabulary; its prompt is but
            the id that answers begin with. Empty for a decoder alone.
        adapter: the number of the LoRA adapter that answers; 0 for the model as it is.
        cache_salt: keeps one tenant's cached prefixes apart from another's.
        session: which one it belongs to, if any.
        deadline: when its answer is cut with what is there, in seconds of `time.monotonic()`.
    """

    prompt_token_ids: list[int]
    sampling: SamplingParams
    stop: StopParams
    encoder_token_ids: list[int] = []
    adapter: int = 0
    cache_salt: str = ""
    session: Session | None = None
    deadline: float | None = None


class TokenLogprob(Struct, frozen=True):
    """A token with its natural-log probability (`None` for a prompt's first token)."""

    id: int
    text: str
    logprob: float | None
    special: bool = False


class OutputToken(Struct, frozen=True):
    """One generated token.

    Attributes:
        text: what this token adds to the detokenised output ("" inside an incomplete character).
        top: the best alternatives, best first; empty unless asked for.
    """

    id: int
    text: str
    logprob: float
    special: bool
    top: list[TokenLogprob] = []


class Finish(Struct, frozen=True, kw_only=True):
    """How a generation ended, with its last output.

    Attributes:
        text: the whole generated text, special tokens left out, cut at a stop string as `StopParams` says.
        queue_s: seconds between arrival in the engine and the first step that took the request in.
        inference_s: seconds between that step's start and the last token.
        cut: the request's deadline ended it.
    """

    reason: FinishReason
    text: str
    generated_tokens: int
    queue_s: float
    inference_s: float
    cut: bool = False


class FirstToken(Struct, frozen=True, kw_only=True):
    """How a request came to its first token, in seconds of `time.monotonic()`.

    Attributes:
        arrived: it was handed to the engine.
        begun: the first step that took it in began; before that it was queued.
        reached: the device had chosen the token, or the request's deadline came before it did.
    """

    arrived: float
    begun: float
    reached: float


class RequestOutput(Struct, frozen=True, kw_only=True):
    """What one step made of one request.

    Attributes:
        request_id: the bridge's number for the request.
        tokens: generated in this step, in order; never held back. Only a last output can be without.
        text: what can now be shown: it lags behind `tokens` while it may still become a stop string that is
            to be removed, and leaves special tokens out.
        prompt: the prompt's tokens with log probabilities; only with the first output, only when asked for.
        first: set on the first output.
        finish: set on the last output.
        error: set instead when the engine had to give the request up; no output follows.
    """

    request_id: int
    tokens: list[OutputToken] = []
    text: str = ""
    prompt: list[TokenLogprob] = []
    first: FirstToken | None = None
    finish: Finish | None = None
    error: str | None = None


class StepStats(Struct, frozen=True, kw_only=True):
    """One engine step in numbers, for the metrics.

    Attributes:
        rows: sequences in the step.
        prompt_tokens: tokens computed for prompts (more than one pending), the rest of the rows decoded one.
        started: sequences that left the queue in this step.
        joined: sequences that were let in while others were running; those put back before count again.
        most_tokens: what the prompts and answers of all running sequences can come to.
        forward_s: seconds from submitting the plan to having its result.
        join_s: seconds that letting in took; 0 where nobody joined.
        decode_s: seconds in which chosen tokens became text and answers.
        filter_s: seconds in which finished sequences were taken out of the batch.
        step_s: seconds of the whole step.
        queried_tokens: prompt tokens of the started sequences for which the prefix cache was asked.
        cached_tokens: those of them that it spared.
        skipped: for each sequence that got tokens, how many came beyond the one that a step gives without guessing.
        gaps: (seconds since the sequence's token before, how many sequences waited so long for theirs).
        failed: the device died with the step; its rows are computed again later.
        blocks_leased: that sessions keep, used or not.
    """

    rows: int
    prompt_tokens: int
    started: int
    waiting: int
    running: int
    preempted: int
    blocks_used: int
    blocks_total: int
    cached_tokens: int
    forward_s: float
    step_s: float
    joined: int = 0
    most_tokens: int = 0
    join_s: float = 0.0
    decode_s: float = 0.0
    filter_s: float = 0.0
    queried_tokens: int = 0
    skipped: tuple[int, ...] = ()
    gaps: tuple[tuple[float, int], ...] = ()
    failed: bool = False
    blocks_leased: int = 0


class Origin(Struct, frozen=True, kw_only=True):
    """What a hub told of the loaded model; nothing of one that lies in a directory.

    Attributes:
        sha: the commit that was fetched.
        pipeline_tag: what the hub says the model is for.
    """

    sha: str | None = None
    pipeline_tag: str | None = None
