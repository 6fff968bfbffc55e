"""Every setting in one table: its flag, its variable, SageMaker's name for it, its default, its help and its docs.

Knows nothing of what a setting does. The only module that reads the environment.
"""

import dataclasses
import os
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, get_args, get_origin

import click

from serving import __version__
from serving.adapter_names import NamedAdapter
from serving.adapter_names import parse as parse_adapter
from serving.errors import ConfigurationError
from serving.setting_kinds import Boolean, kind_of

QUANTIZATIONS = (
    "awq",
    "compressed-tensors",
    "eetq",
    "exl2",
    "gptq",
    "marlin",
    "bitsandbytes",
    "bitsandbytes-nf4",
    "bitsandbytes-fp4",
    "fp8",
)
ATTENTIONS = ("paged", "flashdecoding", "flashdecoding-ipex", "flashinfer")

# Variables of TGI and its images that no flag stands for; accepted, and named in the warning when given.
VARIABLES_WITHOUT_EFFECT = (
    "DISABLE_EXLLAMA",
    "EXLLAMA_VERSION",
    "HF_TASK",
    "LOG_COLORIZE",
    "MAX_IMAGE_FETCH_SIZE",
    "MESSAGES_API_ENABLED",
    "PREFILL_CHUNKING",
    "ROCM_USE_CUSTOM_PAGED_ATTN",
    "ROCM_USE_FLASH_ATTN_V2_TRITON",
    "ROCM_USE_SKINNY_GEMM",
    "TGI_WIGGLE_ROOM",
    "USE_CUTLASS_W8A8",
    "USE_FLASH_ATTENTION",
)

# What TGI's launcher refuses at the start when both are said.
_ORDERED = (
    ("max_total_tokens", "max_batch_total_tokens"),
    ("max_batch_prefill_tokens", "max_batch_total_tokens"),
)
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_API_TOKEN")  # of the hub, the preferred one first

SERVE = "serve"  # the word that SageMaker starts a container with
SERVE_PORT = 8080
SERVE_PORT_VARIABLE = "SAGEMAKER_BIND_TO_PORT"
SERVE_DEFAULTS = types.MappingProxyType(
    {
        "GRACEFUL_TERMINATION_TIMEOUT": "25",  # seconds; SageMaker kills 30 s after SIGTERM
        "RESPONSE_DEADLINE": "55",  # InvokeEndpoint gives up after 60
        "STREAM_DEADLINE": "470",  # InvokeEndpointWithResponseStream after 480
    }
)
SERVE_BATCH_VARIABLE = "SAGEMAKER_BATCH"  # true in a batch transform, whose requests may take long
DEADLINES = ("RESPONSE_DEADLINE", "STREAM_DEADLINE")


def setting(
    default: Any,
    help_text: str,
    *,
    least: float | None = None,
    most: float | None = None,
    choices: Sequence[str] = (),
    size: bool = False,
    sagemaker: str | None = None,
    legacy: str | None = None,
    variable: str | None = None,
    short: str | None = None,
    effect: bool = True,
    as_is: Any = None,
) -> Any:
    """One line of the table.

    Args:
        least, most: bounds of a number, both allowed.
        size: a number of bytes that may be written with a unit.
        sagemaker: SageMaker's variable for it; asked after its own variable.
        legacy: an older name; may not be given together with the new one.
        variable: where it is not the name in capitals; "" where there is none.
        short: a one-letter flag.
        effect: false where the setting is accepted for TGI's sake and changes nothing yet.
        as_is: without effect, the value that asks for what is done anyway.
    """
    return dataclasses.field(
        default=default,
        metadata={
            "help": help_text,
            "least": least,
            "most": most,
            "choices": choices,
            "size": size,
            "sagemaker": sagemaker,
            "legacy": legacy,
            "variable": variable,
            "short": short,
            "effect": effect,
            "as_is": as_is,
        },
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the operator said, resolved: flag, then variable, then SageMaker's variable, then default."""

    # The model
    model_id: str | None = setting(
        None, "The model: a directory, org/name on the hub, or s3://bucket/prefix.", sagemaker="HF_MODEL_ID"
    )
    revision: str | None = setting(None, "Branch, tag or commit on the hub.", sagemaker="HF_MODEL_REVISION")
    dtype: str | None = setting(None, "Computing type.", choices=("float16", "bfloat16", "float32"))
    quantize: str | None = setting(
        None, "Number format.", choices=QUANTIZATIONS, sagemaker="HF_MODEL_QUANTIZE", effect=False
    )
    load_format: str = setting("auto", "Where weights come from; dummy: random ones.", choices=("auto", "dummy"))
    device: str = setting("auto", "What computes.", choices=("auto", "cpu", "cuda"))
    trust_remote_code: bool = setting(
        False,
        "Run code that comes with a model, where it has no architecture here.",
        sagemaker="HF_MODEL_TRUST_REMOTE_CODE",
    )
    sharded: bool | None = setting(None, "Whether several devices have to share the model out.")
    num_shard: int | None = setting(
        None, "Devices that share the model out; all GPUs unless said.", least=1, sagemaker="SM_NUM_GPUS"
    )
    tokenizer_config_path: str | None = setting(None, "A tokenizer_config.json for the chat template.")
    chat_template: str | None = setting(None, "Chat template: its text, a file that holds it, or @ and the file.")
    rope_scaling: str | None = setting(None, "RoPE scaling.", choices=("linear", "dynamic"), effect=False)
    rope_factor: float | None = setting(None, "Factor of the RoPE scaling.", effect=False)
    lora_adapters: tuple[str, ...] = setting(
        (),
        "LoRA adapters to load, with commas: org/name, org/name@revision, or name= and one of these, /path or s3://.",
    )
    max_lora_adapters: int | None = setting(
        None,
        "LoRA adapters for which memory is set aside; those of --lora-adapters unless said.",
        least=0,
        sagemaker="SAGEMAKER_MAX_NUMBER_OF_ADAPTERS_IN_MEMORY",
    )
    max_lora_rank: int = setting(64, "Largest rank of a LoRA adapter.", least=1, most=4096)
    huggingface_hub_cache: str | None = setting(None, "Where downloads are kept; default $HF_HOME/hub.")
    weights_cache_override: str | None = setting(None, "Directory that holds the weight files.", effect=False)

    # What a request may ask
    max_concurrent_requests: int = setting(128, "Requests open at a time; beyond, 429.", least=1)
    max_best_of: int = setting(2, "Most samples of one request.", least=1)
    max_stop_sequences: int = setting(4, "Most stop sequences of one request.", least=0)
    max_top_n_tokens: int = setting(5, "Most alternatives per token.", least=0)
    max_input_tokens: int | None = setting(None, "Longest prompt, in tokens.", least=1, legacy="max_input_length")
    max_total_tokens: int | None = setting(None, "Longest prompt and answer, in tokens.", least=2)
    max_client_batch_size: int = setting(4, "Most prompts of one completion request.", least=1)
    payload_limit: int = setting(2_000_000, "Largest request body, in bytes.", least=1)
    enable_prefill_logprobs: bool = setting(False, "Compute log probabilities of prompts when asked for.")
    disable_grammar_support: bool = setting(False, "Refuse grammars.")
    validation_workers: int = setting(2, "Threads that validate requests.", least=1)

    # Batching and memory
    max_batch_size: int | None = setting(None, "Most sequences in a step.", least=1)
    max_batch_prefill_tokens: int | None = setting(None, "Most tokens in a step.", least=1)
    max_batch_total_tokens: int | None = setting(None, "Most tokens of all sequences.", least=1, effect=False)
    waiting_served_ratio: float = setting(0.3, "When to pause for waiting requests.", effect=False)
    max_waiting_tokens: int = setting(20, "Steps until waiting requests enter.", least=0, effect=False)
    kv_cache_memory: int | None = setting(None, "Memory of the KV cache, such as 2GiB.", least=1, size=True)
    kv_cache_dtype: str | None = setting(
        None, "Type of the KV cache.", choices=("fp8_e4m3fn", "fp8_e5m2"), effect=False
    )
    cuda_memory_fraction: float = setting(1.0, "Share of a GPU's memory to use.", least=0.01, most=1.0)
    prefix_caching: bool = setting(True, "Compute a prefix that requests share once.")
    attention: str | None = setting(None, "Attention kernel.", choices=ATTENTIONS, effect=False)
    cuda_graphs: tuple[int, ...] | None = setting(
        None, "Batch sizes to capture; 0: none.", least=0, effect=False, as_is=(0,)
    )
    speculate: int | None = setting(None, "Tokens to guess per step.", least=0, effect=False, as_is=0)
    disable_custom_kernels: bool = setting(False, "Use no custom kernels.", effect=False)
    watermark_gamma: float = setting(0.5, "Share of the vocabulary that a watermark favours.", least=0.0, most=1.0)
    watermark_delta: float = setting(
        2.0, "How much a watermark adds to the logits of favoured tokens.", least=-100.0, most=100.0
    )

    # The server
    hostname: str = setting("0.0.0.0", "Address to listen at.", variable="WEIR_HOSTNAME")
    port: int = setting(3000, "Port to listen at; 0: any free one.", least=0, most=65535, short="-p")
    api_key: str | None = setting(None, "Ask for this key as a bearer token; a file may hold several, one a line.")
    cors_allow_origin: tuple[str, ...] = setting((), "Origins that browsers may call from; default any.")
    graceful_termination_timeout: int = setting(90, "Seconds for open requests at the end.", least=0, short="-g")
    response_deadline: float = setting(
        0.0, "Seconds after which a whole answer is cut with what is there; 0: never. 55 under `serve`.", least=0.0
    )
    stream_deadline: float = setting(
        0.0, "Seconds after which a streamed answer is cut; 0: never. 470 under `serve`.", least=0.0
    )
    session_lifetime: int = setting(
        1200, "Seconds that a sticky session lives.", least=1, sagemaker="SAGEMAKER_SESSIONS_EXPIRATION"
    )
    session_cache_share: float = setting(
        0.5, "Most of the KV cache that sticky sessions keep while there is room.", least=0.0, most=1.0
    )
    json_output: bool = setting(False, "Write logs as JSON lines.")
    log_level: str = setting("info", "Least level of logs: trace, debug, info, warn, error or off.")
    compute_type: str | None = setting(None, "Value of the x-compute-type header.")
    git_sha: str | None = setting(None, "Commit of this server, for /info; images set it.")
    docker_label: str | None = setting(None, "Label of the image, for /info; images set it.")
    env: bool = setting(False, "Print the runtime environment at start.", variable="", short="-e")
    prometheus_port: int = setting(9000, "Metrics are on the main port.", least=0, most=65535, effect=False)
    otlp_endpoint: str | None = setting(None, "Collector of traces, such as http://localhost:4317.")
    otlp_service_name: str = setting("text-generation-inference.router", "Name in traces.")
    usage_stats: str = setting(
        "on", "Nothing is ever sent.", choices=("on", "off", "no-stack"), effect=False, as_is="off"
    )
    shard_uds_path: str = setting("/tmp/text-generation-server", "Sockets of shards.", effect=False)
    master_addr: str = setting("localhost", "Address of the first shard.", effect=False)
    master_port: int = setting(29500, "Port of the first shard.", least=0, most=65535, effect=False)
    ngrok: bool = setting(False, "Never worked in TGI.", effect=False)
    ngrok_authtoken: str | None = setting(None, "Never worked in TGI.", effect=False)
    ngrok_edge: str | None = setting(None, "Never worked in TGI.", effect=False)

    @classmethod
    def resolve(cls, argv: Sequence[str], environ: Mapping[str, str]) -> Self:
        """Read the command line (without the program's name) and the environment.

        After the word `serve` the port is SageMaker's, and so are the time to drain and the deadlines of answers where
        nothing else is said.

        Raises:
            ConfigurationError: in one line, what is wrong and what to do.
            click.exceptions.Exit: help or version were asked for, and printed.
        """
        serve = bool(argv) and argv[0] == SERVE
        flags = _parse(argv[1:] if serve else argv)
        if serve:
            environ = {**environ, "PORT": environ.get(SERVE_PORT_VARIABLE) or str(SERVE_PORT)}
            batch = environ.get(SERVE_BATCH_VARIABLE, "").lower() == "true"
            defaults = {name: "0" if batch and name in DEADLINES else SERVE_DEFAULTS[name] for name in SERVE_DEFAULTS}
            environ |= {name: default for name, default in defaults.items() if not environ.get(name)}
        values = {entry.name: entry.value(flags, environ) for entry in entries()}
        settings = cls(**{name: value for name, value in values.items() if value is not None})
        if None not in (settings.max_input_tokens, settings.max_total_tokens) and not (
            (settings.max_input_tokens or 0) < (settings.max_total_tokens or 0)
        ):
            raise ConfigurationError("`max_input_tokens` must be < `max_total_tokens`")
        for less, more in _ORDERED:
            small, large = getattr(settings, less), getattr(settings, more)
            if None not in (small, large) and small > large:
                raise ConfigurationError(f"`{less}` must be <= `{more}`. Given: {small} and {large}")
        settings._check_adapters()
        if settings.api_key is not None and not settings.api_keys:
            raise ConfigurationError("`api_key` holds no key; everybody could call.")
        return settings

    @property
    def api_keys(self) -> tuple[str, ...]:
        """The keys, any of which lets in; empty where none is asked for."""
        lines = (line.strip() for line in (self.api_key or "").splitlines())
        return tuple(line for line in lines if line)

    @property
    def adapters(self) -> tuple[NamedAdapter, ...]:
        """The adapters to load at the start. Raises ConfigurationError, but not once the settings are resolved."""
        return tuple(parse_adapter(text) for text in self.lora_adapters)

    @property
    def adapter_room(self) -> int:
        """How many adapters can be loaded at a time."""
        return len(self.lora_adapters) if self.max_lora_adapters is None else self.max_lora_adapters

    def _check_adapters(self) -> None:
        names = [adapter.name for adapter in self.adapters]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigurationError(f"`lora_adapters` names {twice[0]} twice; give one another name: name=place.")
        if self.adapter_room < len(names):
            raise ConfigurationError(
                f"`max_lora_adapters` must be >= the {len(names)} of `lora_adapters`. Given: {self.max_lora_adapters}"
            )

    def environment(self) -> dict[str, str]:
        """The variables from which `resolve` makes these settings again; what is at its default is left out."""
        return {
            entry.variable: write(value)
            for entry in entries()
            if (value := getattr(self, entry.name)) != entry.default and entry.variable
        }

    def without_effect(self, environ: Mapping[str, str]) -> list[str]:
        """The names of everything given that changes nothing in this version."""
        flags = [e.flag for e in entries() if not e.effect and getattr(self, e.name) not in (e.default, e.as_is)]
        return [*flags, *(name for name in VARIABLES_WITHOUT_EFFECT if environ.get(name))]


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One line of the table, read back.

    Attributes:
        names: the field's name, then its older one where there is one.
        variable: "" where there is none.
        kind: converts one value (one item where `many`).
    """

    names: tuple[str, ...]
    default: Any
    help: str
    kind: "click.ParamType[Any]"
    many: bool
    variable: str
    sagemaker: str | None
    short: str | None
    effect: bool
    as_is: Any

    @property
    def name(self) -> str:
        """The field of `Settings`."""
        return self.names[0]

    @property
    def flag(self) -> str:
        """The long flag."""
        return _flag(self.name)

    def option(self, name: str) -> click.Option:
        """The click option for one of its names; values stay text, so that flags and variables are read alike."""
        old = name != self.name
        bare: Any = {"is_flag": False, "flag_value": "true"} if isinstance(self.kind, Boolean) else {}
        return click.Option(
            [name, _flag(name), *([self.short] if self.short and not old else [])],
            type=click.UNPROCESSED,
            multiple=self.many,
            metavar=self.kind.name.upper(),
            help=f"Old name of {self.flag}." if old else self.described(),
            **bare,
        )

    def meaning(self) -> str:
        """Its help, with the choices there are."""
        choices = f" One of {', '.join(self.kind.choices)}." if isinstance(self.kind, click.Choice) else ""
        return f"{self.help}{choices}{'' if self.effect else ' No effect yet.'}"

    def described(self) -> str:
        """Its meaning in one line, with variables and default."""
        origins = ", ".join(filter(None, (self.variable, self.sagemaker)))
        notes = [f"env: {origins}" if origins else "", f"default: {write(self.default)}" if self.default else ""]
        return f"{self.meaning()}{''.join(f' [{note}]' for note in notes if note)}"

    def value(self, flags: Mapping[str, str | tuple[str, ...] | None], environ: Mapping[str, str]) -> Any:
        """The converted value, from wherever it was given; None if nowhere. Raises ConfigurationError."""
        given = [
            (name, _flag(name) if flags.get(name) else variable, flags.get(name) or environ.get(variable) or None)
            for name in self.names
            for variable in [self.variable if name == self.name else name.upper()]
        ]
        given = [origin for origin in given if origin[2] is not None]
        if len(given) > 1:
            new, old = self.names
            raise ConfigurationError(f"`{new}` and `{old}` are both set; set only `{new}`, `{old}` is its old name.")
        if not given and self.sagemaker and environ.get(self.sagemaker):
            given = [(self.name, self.sagemaker, environ[self.sagemaker])]
        if not given:
            return None
        _, origin, raw = given[0]
        try:
            if not self.many:
                return self.kind.convert(_read(str(raw)), None, None)
            texts = [raw] if isinstance(raw, str) else raw or ()
            items = [item.strip() for text in texts for item in _read(text).split(",")]
            return tuple(self.kind.convert(item, None, None) for item in items if item) or None
        except click.BadParameter as error:
            raise ConfigurationError(f"{origin}: {error.message}") from None


def entries() -> list[Entry]:
    """The table, in its order."""
    return [_entry(field) for field in dataclasses.fields(Settings)]


def process_environment() -> dict[str, str]:
    """A copy of this process's environment."""
    return dict(os.environ)


def hub_token(environ: Mapping[str, str]) -> str | None:
    """The token for the hub, which is no setting, so that nothing shows it. Raises ConfigurationError."""
    raw = next((environ[name] for name in TOKEN_VARIABLES if environ.get(name)), "")
    return _read(raw).strip() or None


def without_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """An environment for who may run others' code: without the hub's token, our callers' keys and AWS's credentials."""
    secret = {*TOKEN_VARIABLES, "API_KEY"}
    return {name: value for name, value in environ.items() if name not in secret and not name.startswith("AWS_")}


def calm_hub() -> None:
    """Have the hub's client, once imported, tell nobody what runs here, nor warn of a variable of TGI's images."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.pop("HF_HUB_ENABLE_HF_TRANSFER", None)


def foreign(environ: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment that is none of the settings' own."""
    old = {name.upper() for entry in entries() for name in entry.names[1:]}
    known = {name for entry in entries() for name in (entry.variable, entry.sagemaker)} | old
    return {name: value for name, value in environ.items() if name not in known}


def _entry(field: "dataclasses.Field[Any]") -> Entry:
    meta = field.metadata
    plain = next(kind for kind in _alternatives(field.type) if kind is not types.NoneType)
    many = get_origin(plain) is tuple
    kind = kind_of(get_args(plain)[0] if many else plain, meta)
    names = (field.name, *([meta["legacy"]] if meta["legacy"] else []))
    variable = field.name.upper() if meta["variable"] is None else meta["variable"]
    return Entry(
        names=names,
        default=field.default,
        help=meta["help"],
        kind=kind,
        many=many,
        variable=variable,
        sagemaker=meta["sagemaker"],
        short=meta["short"],
        effect=meta["effect"],
        as_is=meta["as_is"],
    )


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _parse(argv: Sequence[str]) -> dict[str, str | tuple[str, ...] | None]:
    options: list[click.Parameter] = [entry.option(name) for entry in entries() for name in entry.names]
    command = click.Command(
        "weir",
        params=[*options, *click.version_option(__version__, prog_name="weir")(click.Command(None)).params],
        help="Serve a text-generation model. `weir serve` follows SageMaker's rules for port and shutdown; "
        "`weir plan` says what a model needs, `weir download-weights` brings it here, `weir convert` turns .bin "
        "weights into safetensors. A flag wins over its variable; any value may be @/path/to/a/file that holds it.",
        context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 120},
    )
    try:
        return command.make_context("weir", list(argv)).params
    except click.UsageError as error:
        raise ConfigurationError(f"{error.format_message()} See `weir --help`.".replace("\n", " ")) from None


def _read(raw: str) -> str:
    """A value as written, or what the file holds that `@/path` names; `@@` stands for a first `@`."""
    if raw.startswith("@@") or not raw.startswith("@"):
        return raw.removeprefix("@") if raw.startswith("@@") else raw
    try:
        return Path(raw[1:]).read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigurationError(f"Cannot read the file of the value {raw!r}: {reason}.") from None


def write(value: Any) -> str:
    """A value as a variable holds it; `resolve` reads it back."""
    if isinstance(value, bool):
        return str(value).lower()
    text = ",".join(str(item) for item in value) if isinstance(value, tuple) else str(value)
    return f"@{text}" if text.startswith("@") else text
