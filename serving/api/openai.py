"""What OpenAI's routes have in common: the words for an end, names, usage and log probabilities.

Knows nothing of TGI's own dialect.
"""

import uuid
from collections.abc import Sequence
from types import MappingProxyType

from serving.api.schemas.float32 import shortest
from serving.api.schemas.openai import Logprobs, TokenLogprobs, TopLogprob, Usage
from serving.protocol import FinishReason, OutputToken

FINISH_REASONS = MappingProxyType(
    {FinishReason.LENGTH: "length", FinishReason.EOS_TOKEN: "stop", FinishReason.STOP_SEQUENCE: "stop"}
)


def new_id(kind: str) -> str:
    """A name for an answer that no other answer has."""
    return f"{kind}-{uuid.uuid4().hex}"


def usage_of(prompt_tokens: int, completion_tokens: int) -> Usage:
    """The tokens of an answer, with their sum."""
    return Usage(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens)


def logprobs_of(tokens: Sequence[OutputToken]) -> Logprobs:
    """The log probabilities of tokens and their alternatives."""
    return Logprobs(
        content=[
            TokenLogprobs(
                token=token.text,
                logprob=shortest(token.logprob),
                top_logprobs=[TopLogprob(top.text, shortest(top.logprob)) for top in token.top],
            )
            for token in tokens
        ]
    )
