"""What the fields of requests mean, in words for the reader of the API's document, with the bounds that hold for all.

Knows no route. The bounds are the validator's, said again where a program can read them; limits that an operator sets
are not among them. A test holds both together.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, slots=True)
class Meaning:
    """Of one field.

    Attributes:
        words: a sentence or two.
        bounds: JSON schema keywords, narrower than the field's type.
    """

    words: str
    bounds: Mapping[str, Any] = field(default_factory=dict)


POSITIVE: Mapping[str, Any] = MappingProxyType({"exclusiveMinimum": 0})
SHARE: Mapping[str, Any] = MappingProxyType({"exclusiveMinimum": 0, "maximum": 1})
PENALTY: Mapping[str, Any] = MappingProxyType({"minimum": -2, "maximum": 2})

NOT_EMPTY: Mapping[str, Any] = MappingProxyType({"minItems": 1})

# What a model asks of its fields together.
RULES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "ChatMessage": MappingProxyType(
            {
                "anyOf": [
                    {"required": [name], "properties": {name: {"not": {"type": "null"}}}}
                    for name in ("content", "tool_calls")
                ]
            }
        )
    }
)

# By the field's name, or by model and name where a name means two things.
MEANINGS: Mapping[str, Meaning] = MappingProxyType(
    {
        # TGI's routes
        "inputs": Meaning("The text to go on with."),
        "parameters": Meaning("How to go on. Left out entirely, tokens are drawn; given, `do_sample` says."),
        "best_of": Meaning("Draw so many answers and give the likeliest one. Not for streams."),
        "repetition_penalty": Meaning(
            "Above 1, tokens that the text already has become less likely. 1 is off.", POSITIVE
        ),
        "GenerateParameters.frequency_penalty": Meaning(
            "Tokens become less likely with their share of the text so far. 0 is off.", PENALTY
        ),
        "GenerateParameters.temperature": Meaning("Below 1 likely tokens become likelier, above 1 less.", POSITIVE),
        "top_k": Meaning("Draw from the so many likeliest tokens only.", MappingProxyType({"minimum": 1})),
        "top_p": Meaning("Draw from the likeliest tokens that together have this probability. 1 is off.", SHARE),
        "typical_p": Meaning("Draw from the most typical tokens that together have this probability. 1 is off.", SHARE),
        "min_p": Meaning(
            "Leave out tokens less likely than this share of the likeliest one's probability. 0 is off.",
            MappingProxyType({"minimum": 0, "maximum": 1}),
        ),
        "do_sample": Meaning("Draw tokens instead of always taking the likeliest one."),
        "max_new_tokens": Meaning(
            "At most so many tokens. Without it, as many as the model's context has room for.",
            MappingProxyType({"minimum": 1}),
        ),
        "return_full_text": Meaning("Put the prompt before the answer."),
        "truncate": Meaning("Keep only the last so many tokens of the prompt.", MappingProxyType({"minimum": 1})),
        "watermark": Meaning("Mark the text as generated (Kirchenbauer et al., 2023)."),
        "details": Meaning("Say how the answer came about: its tokens, their log probabilities, the seed."),
        "decoder_input_details": Meaning("The prompt's tokens too. Not for streams."),
        "top_n_tokens": Meaning("For each token, report so many of the likeliest ones at its place."),
        "grammar": Meaning(
            'What the text has to be: `{"type": "json", "value": a JSON schema}` or '
            '`{"type": "regex", "value": a regular expression}`.'
        ),
        "adapter_id": Meaning("The LoRA adapter that answers; without it, the model as it is."),
        # OpenAI's routes
        "messages": Meaning("The conversation so far."),
        "model": Meaning(
            "The LoRA adapter that answers. `tgi`, an empty text and the served model's own name mean the model as it "
            "is; so does any name while no adapter is loaded."
        ),
        "prompt": Meaning("A text to go on with, several of them, or their token ids.", NOT_EMPTY),
        "max_tokens": Meaning(
            "At most so many tokens. Without it, as many as the model's context has room for.",
            MappingProxyType({"minimum": 1}),
        ),
        "max_completion_tokens": Meaning(
            "OpenAI's newer name of `max_tokens`; wins over it.", MappingProxyType({"minimum": 1})
        ),
        "temperature": Meaning(
            "Below 1 likely tokens become likelier, above 1 less. 0: always the likeliest token.",
            MappingProxyType({"minimum": 0}),
        ),
        "frequency_penalty": Meaning(
            "Tokens become less likely each time that the answer has them. 0 is off.", PENALTY
        ),
        "presence_penalty": Meaning("Tokens become less likely once the answer has them. 0 is off.", PENALTY),
        "stream_options": Meaning("How a stream ends."),
        "include_usage": Meaning("End with an event that counts the tokens."),
        "logprobs": Meaning("Report each token's log probability."),
        "top_logprobs": Meaning("For each token, report so many of the likeliest ones at its place."),
        "tools": Meaning("Functions that the model may ask to have called."),
        "tool_choice": Meaning(
            "`auto`: the model decides; `none`: no call; `required`: at least one; or the function to call."
        ),
        "tool_prompt": Meaning("What tells the model about tools, where its template does not."),
        "parallel_tool_calls": Meaning("Whether the model may ask for several calls at once."),
        "CompletionRequest.logprobs": Meaning("Report each token's log probability, and so many alternatives."),
        "instances": Meaning("Bodies of `/generate` and of `/v1/chat/completions`.", NOT_EMPTY),
        "response_format": Meaning(
            "What the text has to be: free text, JSON, JSON of a schema, or a regular expression."
        ),
        "logit_bias": Meaning("By token id, what to add to the token's logit."),
        "n": Meaning("Give so many answers.", MappingProxyType({"minimum": 1})),
        "echo": Meaning("Put the prompt before the answer."),
        "suffix": Meaning("Not supported: put it into the prompt."),
        "chat_template_kwargs": Meaning("More variables for the chat template."),
        # SageMaker's
        "requestType": Meaning("What is to become of a session."),
        "AdapterRequest.name": Meaning("What requests call the adapter."),
        "src": Meaning("The directory that holds it."),
        "preload": Meaning("Taken as true."),
        "pin": Meaning("Taken as true."),
        # both
        "stop": Meaning("End where one of these texts is complete."),
        "seed": Meaning("The same seed gives the same draws."),
        "stream": Meaning("Answer with server-sent events while the text is made."),
        "ignore_eos": Meaning("Go on over the model's end-of-sequence tokens."),
        "stop_token_ids": Meaning("End at one of these tokens.", MappingProxyType({"maxItems": 128})),
        "include_stop_str_in_output": Meaning(
            "Whether the text keeps the stop text that ended it: by default it does on TGI's routes, not on OpenAI's."
        ),
    }
)


def meaning_of(model: str, name: str) -> Meaning | None:
    """Of a model's field; None where its name must do."""
    return MEANINGS.get(f"{model}.{name}", MEANINGS.get(name))
