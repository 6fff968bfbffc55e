"""What every route takes and gives, for readers: one `Operation` for each method of each path.

Knows no field: the schemas are the ones that the routes use.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from serving.api import errors
from serving.api.docs import DOCS_FILES, PLAYGROUND_FILES
from serving.api.schemas.chat import ChatCompletion, ChatCompletionChunk, ChatRequest
from serving.api.schemas.completions import Completion, CompletionChunk, CompletionRequest
from serving.api.schemas.native import (
    ChatTokenizeResponse,
    CompatGenerateRequest,
    GenerateRequest,
    GenerateResponse,
    Info,
    StreamResponse,
    TokenizePiece,
)
from serving.api.schemas.openai import Model, ModelList
from serving.api.schemas.sagemaker import (
    AdapterDescription,
    AdapterList,
    AdapterRequest,
    ExecutionParameters,
    SessionRequest,
    Status,
)
from serving.api.schemas.strict import StrictModel
from serving.api.schemas.vertex import VertexRequest, VertexResponse
from serving.errors import (
    AdapterConflict,
    AdapterNotFound,
    AdapterRefused,
    AdaptersUnsupported,
    GenerationError,
    IncompleteGeneration,
    ModelNotFound,
    NoInstances,
    NoRoomForAdapter,
    NotReady,
    Overloaded,
    RequestError,
    ShuttingDown,
    SuffixNotSupported,
    TemplateError,
    ToolError,
    TooManyPrompts,
    Unhealthy,
    UnknownRoute,
    UnknownSession,
    ValidationError,
)

NATIVE, OPENAI, CLOUD, SERVER = "Text Generation Inference", "OpenAI", "Cloud platforms", "Server"
TAGS = MappingProxyType(
    {
        NATIVE: "TGI's own routes.",
        OPENAI: "The routes of OpenAI's API.",
        CLOUD: "What SageMaker and Vertex AI call.",
        SERVER: "What operators and browsers ask.",
    }
)

HTML, PLAIN_TEXT, JSON = "text/html; charset=utf-8", "text/plain; charset=utf-8", "application/json"

UNAVAILABLE = (NotReady, ShuttingDown)
GENERATION = (ValidationError, GenerationError, Overloaded, *UNAVAILABLE, IncompleteGeneration, errors.Internal)
CONVERSATION = (*GENERATION, TemplateError, ToolError, ModelNotFound)
COMPLETION = (*GENERATION, SuffixNotSupported, TooManyPrompts, ModelNotFound)

# The header names are those of `headers.timing_headers`.
TIMINGS = MappingProxyType(
    {
        "x-compute-type": "The hardware that answered.",
        "x-compute-time": "Seconds that the request took.",
        "x-compute-characters": "Characters of the prompt.",
        "x-total-time": "Milliseconds that the request took.",
        "x-validation-time": "Milliseconds until the request was checked.",
        "x-queue-time": "Milliseconds that it waited.",
        "x-inference-time": "Milliseconds that the model took.",
        "x-time-per-token": "Milliseconds a generated token.",
        "x-prompt-tokens": "Tokens of the prompt.",
        "x-generated-tokens": "Tokens of the answer.",
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """A method of a path.

    Attributes:
        method: in lower case.
        takes: the bodies that fit, in the order in which they are tried; none: there is no body.
        examples: bodies, by what they show.
        gives: types of the JSON answer; several: one of them.
        streams: types of the events' data, if the answer can be a stream.
        done: whether such a stream ends with `[DONE]`.
        content: the content type of an answer that is no JSON.
        moved: where the answer sends the client, if it does nothing else.
        fails: what can go wrong, besides the body and the key.
        dialects: of the errors.
        public: whether it never asks for the key.
        timed: whether a whole answer says in headers what it cost.
        named: what the name in the path can be, where that is known.
    """

    method: str
    path: str
    summary: str
    words: str = ""
    tag: str = SERVER
    takes: tuple[type[StrictModel], ...] = ()
    examples: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    gives: tuple[Any, ...] = ()
    streams: tuple[Any, ...] = ()
    done: bool = False
    content: str | None = None
    moved: str | None = None
    fails: tuple[type[RequestError], ...] = ()
    dialects: tuple[errors.Dialect, ...] = (errors.native_body,)
    public: bool = False
    timed: bool = False
    named: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The operation's id: `post_generate`."""
        steps = ["root"] if self.path == "/" else self.path.removeprefix("/").split("/")
        words = "_".join([self.method, *(step or "index" for step in steps)])
        return words.translate(str.maketrans("-.", "__", "{}"))


GENERATE_EXAMPLES = {
    "Short": {"inputs": "What is Deep Learning?", "parameters": {"max_new_tokens": 40}},
    "Drawn, with details": {
        "inputs": "What is Deep Learning?",
        "parameters": {"max_new_tokens": 40, "temperature": 0.8, "top_p": 0.95, "seed": 7, "details": True},
    },
    "JSON of a schema": {
        "inputs": "Name a city and its country as JSON: ",
        "parameters": {
            "max_new_tokens": 80,
            "grammar": {
                "type": "json",
                "value": {
                    "type": "object",
                    "properties": {"city": {"type": "string"}, "country": {"type": "string"}},
                    "required": ["city", "country"],
                },
            },
        },
    },
}
STREAM_EXAMPLES = {name: GENERATE_EXAMPLES[name] for name in ("Short", "Drawn, with details")}
CHAT_EXAMPLES = {
    "Question": {"messages": [{"role": "user", "content": "What is Deep Learning?"}], "max_tokens": 60},
    "Stream": {
        "model": "tgi",
        "messages": [
            {"role": "system", "content": "You answer in one sentence."},
            {"role": "user", "content": "What is Deep Learning?"},
        ],
        "max_tokens": 60,
        "stream": True,
        "stream_options": {"include_usage": True},
    },
    "JSON of a schema": {
        "messages": [{"role": "user", "content": "Name a city and its country."}],
        "max_tokens": 80,
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "name": "place",
                "schema": {
                    "type": "object",
                    "properties": {"city": {"type": "string"}, "country": {"type": "string"}},
                    "required": ["city", "country"],
                },
            },
        },
    },
}
COMPLETION_EXAMPLES = {
    "Text": {"prompt": "Deep Learning is", "max_tokens": 40},
    "Two texts": {"prompt": ["Deep Learning is", "A river is"], "max_tokens": 40, "temperature": 0},
}
INVOCATIONS = """\
The shape of the body says what it is: with `inputs` it is answered as by `/`, with `messages` as by \
`/v1/chat/completions`, with `prompt` as by `/v1/completions`.

Of content type `text/plain` the body is the text to go on with; of `application/jsonlines` it holds one such body a \
line, and is answered with one answer a line in the same order; a failure is told in its own line. `Accept: \
text/plain` gives the text of an answer alone, `Accept: text/event-stream` asks for a stream where `stream` is absent.

`{"requestType": "NEW_SESSION"}` begins a session and `{"requestType": "CLOSE"}` ends the one that the header \
`X-Amzn-SageMaker-Session-Id` names; what the last request of a session computed is kept for its next one. \
`X-Amzn-SageMaker-Custom-Attributes: route=/v1/chat/completions` hands the request to another route. \
`X-Amzn-SageMaker-Inference-Id` names the request, `X-Amzn-SageMaker-Adapter-Identifier` the LoRA adapter that \
answers, whatever the body says.\
"""
ADAPTERS = """\
`src` is a directory of the server's machine, as a path or with `file://`, that holds `adapter_config.json` and \
`adapter_model.safetensors`. The adapter is loaded before the answer, whatever `preload` says, and stays until it is \
unloaded, whatever `pin` says; `--max-lora-adapters` bounds how many there may be. The same name and place once more \
change nothing. All of it may stand in the query in place of a body.\
"""
EVERY_DIALECT = (errors.native_body, errors.openai_body)

OPERATIONS = (
    Operation(
        method="post",
        path="/generate",
        tag=NATIVE,
        summary="Go on with a text",
        takes=(GenerateRequest,),
        examples=GENERATE_EXAMPLES,
        gives=(GenerateResponse,),
        fails=GENERATION,
        timed=True,
    ),
    Operation(
        method="post",
        path="/generate_stream",
        tag=NATIVE,
        summary="Go on with a text, token by token",
        words="Errors of the request are events too, under status 200; with the header `X-Strict-Status: true` they "
        "have their own status while nothing was sent yet.",
        takes=(GenerateRequest,),
        examples=STREAM_EXAMPLES,
        streams=(StreamResponse,),
        fails=GENERATION,
    ),
    Operation(
        method="post",
        path="/",
        tag=NATIVE,
        summary="Go on with a text, whole or token by token",
        words="As `/generate`, in a list of one, or as `/generate_stream` if `stream` says so.",
        takes=(CompatGenerateRequest,),
        examples=GENERATE_EXAMPLES,
        gives=(list[GenerateResponse],),
        streams=(StreamResponse,),
        fails=GENERATION,
        timed=True,
    ),
    Operation(
        method="post",
        path="/tokenize",
        tag=NATIVE,
        summary="The tokens of a text",
        words="`start` and `stop` count bytes.",
        takes=(GenerateRequest,),
        examples={"Text": {"inputs": "What is Deep Learning?"}},
        gives=(list[TokenizePiece],),
        fails=(*UNAVAILABLE, errors.Internal),
    ),
    Operation(
        method="post",
        path="/chat_tokenize",
        tag=NATIVE,
        summary="A conversation as the model reads it: its text and its tokens",
        takes=(ChatRequest,),
        examples={"Question": CHAT_EXAMPLES["Question"]},
        gives=(ChatTokenizeResponse,),
        fails=(*UNAVAILABLE, ValidationError, TemplateError, ToolError, errors.Internal),
    ),
    Operation(
        method="post",
        path="/v1/chat/completions",
        tag=OPENAI,
        summary="Answer a conversation",
        takes=(ChatRequest,),
        examples=CHAT_EXAMPLES,
        gives=(ChatCompletion,),
        streams=(ChatCompletionChunk,),
        done=True,
        fails=CONVERSATION,
        dialects=(errors.openai_body,),
        timed=True,
    ),
    Operation(
        method="post",
        path="/v1/completions",
        tag=OPENAI,
        summary="Go on with one text or several",
        takes=(CompletionRequest,),
        examples=COMPLETION_EXAMPLES,
        gives=(Completion,),
        streams=(CompletionChunk,),
        done=True,
        fails=COMPLETION,
        dialects=(errors.openai_body,),
        timed=True,
    ),
    Operation(
        method="get",
        path="/v1/models",
        tag=OPENAI,
        summary="The models that are served",
        gives=(ModelList,),
        dialects=(errors.openai_body,),
    ),
    Operation(
        method="get",
        path="/v1/models/{name}",
        tag=OPENAI,
        summary="One model",
        gives=(Model,),
        fails=(ModelNotFound,),
        dialects=(errors.openai_body,),
    ),
    Operation(
        method="post",
        path="/invocations",
        tag=CLOUD,
        summary="SageMaker's door: any of the other bodies",
        words=INVOCATIONS,
        takes=(CompatGenerateRequest, ChatRequest, CompletionRequest, SessionRequest),
        examples={
            "Text": GENERATE_EXAMPLES["Short"],
            "Conversation": CHAT_EXAMPLES["Question"],
            "Prompt": COMPLETION_EXAMPLES["Text"],
            "Session": {"requestType": "NEW_SESSION"},
        },
        gives=(list[GenerateResponse], ChatCompletion, Completion, Status),
        streams=(StreamResponse, ChatCompletionChunk, CompletionChunk),
        done=True,
        fails=(*CONVERSATION, SuffixNotSupported, TooManyPrompts, UnknownSession, UnknownRoute, AdapterNotFound),
        dialects=EVERY_DIALECT,
        timed=True,
    ),
    Operation(
        method="get",
        path="/execution-parameters",
        tag=CLOUD,
        summary="How a batch transform had better ask",
        gives=(ExecutionParameters,),
        fails=UNAVAILABLE,
    ),
    Operation(
        method="get",
        path="/adapters",
        tag=CLOUD,
        summary="The LoRA adapters that are loaded",
        gives=(AdapterList,),
        fails=UNAVAILABLE,
    ),
    Operation(
        method="post",
        path="/adapters",
        tag=CLOUD,
        summary="Load a LoRA adapter",
        words=ADAPTERS,
        takes=(AdapterRequest,),
        examples={"Directory": {"name": "french", "src": "/opt/ml/adapters/french"}},
        gives=(Status,),
        fails=(
            ValidationError,
            AdaptersUnsupported,
            AdapterConflict,
            NoRoomForAdapter,
            AdapterRefused,
            *UNAVAILABLE,
        ),
    ),
    Operation(
        method="get",
        path="/adapters/{name}",
        tag=CLOUD,
        summary="One LoRA adapter, in a list of one",
        gives=(list[AdapterDescription],),
        fails=(AdapterNotFound, *UNAVAILABLE),
    ),
    Operation(
        method="delete",
        path="/adapters/{name}",
        tag=CLOUD,
        summary="Unload a LoRA adapter",
        words="Requests that it is answering already are answered to their end.",
        gives=(Status,),
        fails=(AdapterNotFound, *UNAVAILABLE),
    ),
    Operation(
        method="post",
        path="/vertex",
        tag=CLOUD,
        summary="Vertex AI's door: a batch of texts and conversations",
        words="Of an instance's parameters only `max_new_tokens` and `seed` count; tokens are drawn.",
        takes=(VertexRequest,),
        examples={
            "Two": {"instances": [GENERATE_EXAMPLES["Short"], CHAT_EXAMPLES["Question"]]},
        },
        gives=(VertexResponse,),
        fails=(*CONVERSATION, NoInstances),
    ),
    Operation(method="get", path="/info", summary="The model and its limits", gives=(Info,), fails=UNAVAILABLE),
    Operation(
        method="get",
        path="/",
        summary="Whether a request sent now would be served",
        fails=(Unhealthy,),
        public=True,
    ),
    Operation(
        method="get",
        path="/health",
        summary="Whether a request sent now would be served",
        fails=(Unhealthy,),
        public=True,
    ),
    Operation(
        method="get",
        path="/ping",
        summary="Whether a request sent now would be served",
        words="SageMaker's name of `/health`.",
        fails=(Unhealthy,),
        public=True,
    ),
    Operation(method="post", path="/ping", summary="As `GET /ping`", fails=(Unhealthy,)),
    Operation(method="get", path="/metrics", summary="Metrics in Prometheus' text format", content=PLAIN_TEXT),
    Operation(method="get", path="/api-doc/openapi.json", summary="This document", gives=(dict[str, Any],)),
    Operation(method="get", path="/docs", summary="Leads to `/docs/`", moved="/docs/"),
    Operation(method="get", path="/docs/", summary="This document as a page that can be tried out", content=HTML),
    Operation(method="get", path="/docs/{name}", summary="A file of that page", content="*/*", named=DOCS_FILES),
    Operation(method="get", path="/playground", summary="A page to try the model in", content=HTML),
    Operation(
        method="get", path="/playground/{name}", summary="A file of that page", content="*/*", named=PLAYGROUND_FILES
    ),
)
