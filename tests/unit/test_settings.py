"""The table of settings: TGI's names, the order of precedence, one line per error, and the way back."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.adapter_names import parse
from serving.errors import ConfigurationError
from serving.settings import VARIABLES_WITHOUT_EFFECT, Entry, Settings, entries, foreign

# What TGI's launcher takes: field, a value as text, the value.
TGI = [
    ("model_id", "/models/a", "/models/a"),
    ("revision", "main", "main"),
    ("validation_workers", "3", 3),
    ("sharded", "true", True),
    ("num_shard", "2", 2),
    ("quantize", "bitsandbytes-nf4", "bitsandbytes-nf4"),
    ("speculate", "3", 3),
    ("dtype", "bfloat16", "bfloat16"),
    ("kv_cache_dtype", "fp8_e5m2", "fp8_e5m2"),
    ("trust_remote_code", "true", True),
    ("max_concurrent_requests", "7", 7),
    ("max_best_of", "3", 3),
    ("max_stop_sequences", "9", 9),
    ("max_top_n_tokens", "6", 6),
    ("max_input_tokens", "100", 100),
    ("max_total_tokens", "200", 200),
    ("waiting_served_ratio", "1.2", 1.2),
    ("max_batch_prefill_tokens", "4096", 4096),
    ("max_batch_total_tokens", "16000", 16000),
    ("max_waiting_tokens", "10", 10),
    ("max_batch_size", "32", 32),
    ("cuda_graphs", "1,2,4", (1, 2, 4)),
    ("port", "8081", 8081),
    ("prometheus_port", "9001", 9001),
    ("shard_uds_path", "/run/s", "/run/s"),
    ("master_addr", "10.0.0.1", "10.0.0.1"),
    ("master_port", "29501", 29501),
    ("huggingface_hub_cache", "/data", "/data"),
    ("weights_cache_override", "/w", "/w"),
    ("disable_custom_kernels", "true", True),
    ("cuda_memory_fraction", "0.5", 0.5),
    ("rope_scaling", "dynamic", "dynamic"),
    ("rope_factor", "2.0", 2.0),
    ("json_output", "true", True),
    ("otlp_endpoint", "http://o:4317", "http://o:4317"),
    ("otlp_service_name", "mine", "mine"),
    ("cors_allow_origin", "https://a.example", ("https://a.example",)),
    ("api_key", "s3cret", "s3cret"),
    ("git_sha", "0123abc", "0123abc"),
    ("docker_label", "sha-0123abc", "sha-0123abc"),
    ("watermark_gamma", "0.25", 0.25),
    ("watermark_delta", "1.5", 1.5),
    ("ngrok", "true", True),
    ("ngrok_authtoken", "t", "t"),
    ("ngrok_edge", "e", "e"),
    ("tokenizer_config_path", "/t.json", "/t.json"),
    ("disable_grammar_support", "true", True),
    ("max_client_batch_size", "8", 8),
    ("lora_adapters", "a,b=/c", ("a", "b=/c")),
    ("usage_stats", "no-stack", "no-stack"),
    ("payload_limit", "1000", 1000),
    ("enable_prefill_logprobs", "true", True),
    ("graceful_termination_timeout", "30", 30),
    ("attention", "flashinfer", "flashinfer"),
    ("prefix_caching", "0", False),
    ("log_level", "debug", "debug"),
    ("compute_type", "gpu", "gpu"),
]


@pytest.mark.parametrize(("name", "text", "value"), TGI)
def test_every_setting_of_tgi_is_taken_as_flag_and_as_variable(name, text, value):
    flag = "--" + name.replace("_", "-")
    assert getattr(Settings.resolve([flag, text], {}), name) == value
    assert getattr(Settings.resolve([f"{flag}={text}"], {}), name) == value
    assert getattr(Settings.resolve([], {name.upper(): text}), name) == value


@pytest.mark.parametrize("name", VARIABLES_WITHOUT_EFFECT)
def test_variables_of_tgi_without_a_flag_are_accepted_and_named(name):
    environ = {name: "1"}
    assert Settings.resolve([], environ).without_effect(environ) == [name]


def test_defaults_are_those_of_tgi():
    settings = Settings.resolve([], {})
    assert (settings.port, settings.hostname, settings.max_concurrent_requests) == (3000, "0.0.0.0", 128)
    assert (settings.max_best_of, settings.max_stop_sequences, settings.max_top_n_tokens) == (2, 4, 5)
    assert (settings.max_client_batch_size, settings.payload_limit, settings.validation_workers) == (4, 2_000_000, 2)
    assert (settings.graceful_termination_timeout, settings.waiting_served_ratio) == (90, 0.3)
    assert settings == Settings()


@pytest.mark.parametrize(
    ("variable", "name", "text", "value"),
    [
        ("HF_MODEL_ID", "model_id", "a/b", "a/b"),
        ("HF_MODEL_REVISION", "revision", "v1", "v1"),
        ("SM_NUM_GPUS", "num_shard", "4", 4),
        ("HF_MODEL_QUANTIZE", "quantize", "awq", "awq"),
        ("HF_MODEL_TRUST_REMOTE_CODE", "trust_remote_code", "true", True),
        ("SAGEMAKER_MAX_NUMBER_OF_ADAPTERS_IN_MEMORY", "max_lora_adapters", "4", 4),
    ],
)
def test_sagemakers_names_are_variables_and_never_flags(variable, name, text, value):
    assert getattr(Settings.resolve([], {variable: text}), name) == value
    with pytest.raises(ConfigurationError, match="No such option"):
        Settings.resolve(["--" + variable.lower().replace("_", "-"), text], {})


def test_flag_beats_variable_beats_sagemaker_beats_default():
    environ = {"HF_MODEL_ID": "c"}
    assert Settings.resolve([], environ).model_id == "c"
    environ["MODEL_ID"] = "b"
    assert Settings.resolve([], environ).model_id == "b"
    assert Settings.resolve(["--model-id", "a"], environ).model_id == "a"


def test_an_empty_variable_is_an_unset_one():
    environ = {"QUANTIZE": "", "SM_NUM_GPUS": "", "MODEL_ID": "", "HF_MODEL_ID": "b", "TRUST_REMOTE_CODE": ""}
    assert Settings.resolve([], environ) == Settings(model_id="b")


def test_booleans_stand_alone_or_with_a_value():
    assert Settings.resolve(["--json-output"], {}).json_output
    assert Settings.resolve(["--json-output", "--trust-remote-code"], {}).trust_remote_code
    assert not Settings.resolve(["--json-output=false"], {"JSON_OUTPUT": "true"}).json_output
    assert Settings.resolve(["--sharded", "false"], {}).sharded is False


def test_short_flags():
    settings = Settings.resolve(["-p", "81", "-g", "5", "-e"], {})
    assert (settings.port, settings.graceful_termination_timeout, settings.env) == (81, 5, True)


def test_lists_repeat_or_have_commas():
    flags = ["--cors-allow-origin", "https://a", "--cors-allow-origin", "https://b, https://c"]
    assert Settings.resolve(flags, {}).cors_allow_origin == ("https://a", "https://b", "https://c")


@pytest.mark.parametrize(
    ("text", "size"),
    [("1000", 1000), ("2GiB", 2 << 30), ("512MB", 512_000_000), ("1.5 GiB", 3 << 29), ("64k", 64_000), ("10B", 10)],
)
def test_sizes_have_units(text, size):
    assert Settings.resolve(["--kv-cache-memory", text], {}).kv_cache_memory == size


def test_the_old_name_of_max_input_tokens():
    assert Settings.resolve(["--max-input-length", "9"], {}).max_input_tokens == 9
    assert Settings.resolve([], {"MAX_INPUT_LENGTH": "9"}).max_input_tokens == 9
    for flags, environ in [
        (["--max-input-length", "9", "--max-input-tokens", "8"], {}),
        ([], {"MAX_INPUT_LENGTH": "9", "MAX_INPUT_TOKENS": "8"}),
        (["--max-input-tokens", "9"], {"MAX_INPUT_LENGTH": "8"}),
    ]:
        with pytest.raises(ConfigurationError, match="both set"):
            Settings.resolve(flags, environ)


def test_a_value_from_a_file(tmp_path):
    file = tmp_path / "key"
    file.write_text("s3cret\n")
    assert Settings.resolve([], {"API_KEY": f"@{file}"}).api_key == "s3cret"
    assert Settings.resolve(["--api-key", "@@home"], {}).api_key == "@home"
    with pytest.raises(ConfigurationError, match="No such file"):
        Settings.resolve(["--api-key", f"@{tmp_path}/none"], {})


def test_a_file_may_hold_several_keys_and_the_environment_passes_them_on(tmp_path):
    file = tmp_path / "keys"
    file.write_text("one\n\n  two words \r\n")
    settings = Settings.resolve([], {"API_KEY": f"@{file}"})
    assert settings.api_keys == ("one", "two words")
    assert Settings.resolve([], settings.environment()).api_keys == settings.api_keys
    assert Settings.resolve([], {}).api_keys == ()


@pytest.mark.parametrize("content", ["", "\n", "  \n\t\n"])
def test_a_file_of_keys_without_a_key_opens_nothing(tmp_path, content):
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(ConfigurationError, match="holds no key"):
        Settings.resolve([f"--api-key=@{file}"], {})


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-concurent-requests", "3"], "Did you mean '--max-concurrent-requests'?"),
        (["--num-shards", "3"], "Did you mean one of: '--num-shard'"),
        (["--port", "http"], "--port: 'http' is not a valid integer"),
        (["--port", "65536"], "--port: 65536 is not in the range"),
        (["--port"], "requires an argument"),
        (["--dtype", "int3"], "'int3' is not one of 'float16', 'bfloat16', 'float32'"),
        (["--json-output=perhaps"], "'perhaps' is neither true nor false"),
        (["--rope-factor", "nan"], "not a finite number"),
        (["--cuda-memory-fraction", "1.1"], "not in the range"),
        (["--kv-cache-memory", "much"], "not a size"),
        (["--cuda-graphs", "1,x"], "'x' is not a valid integer"),
        (["--max-input-tokens", "9", "--max-total-tokens", "9"], "`max_input_tokens` must be < `max_total_tokens`"),
        (
            ["--max-total-tokens", "9", "--max-batch-total-tokens", "8"],
            "`max_total_tokens` must be <= `max_batch_total_tokens`. Given: 9 and 8",
        ),
        (
            ["--max-batch-prefill-tokens", "9", "--max-batch-total-tokens", "8"],
            "`max_batch_prefill_tokens` must be <= `max_batch_total_tokens`. Given: 9 and 8",
        ),
        (["train"], "train"),
        (["--lora-adapters", "a,org/b@v1,a=/x"], "`lora_adapters` names a twice"),
        (["--lora-adapters", "a,b", "--max-lora-adapters", "1"], "must be >= the 2 of `lora_adapters`. Given: 1"),
        (["--max-lora-rank", "0"], "not in the range"),
    ],
)
def test_an_error_is_one_line_that_says_what_is_wrong(flags, words):
    with pytest.raises(ConfigurationError) as error:
        Settings.resolve(flags, {})
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_an_error_names_the_variable_that_it_came_from():
    with pytest.raises(ConfigurationError, match=r"^SM_NUM_GPUS: "):
        Settings.resolve([], {"SM_NUM_GPUS": "all"})


def test_serve_follows_sagemakers_rules():
    image = {"PORT": "80"}
    assert Settings.resolve(["serve"], image).port == 8080
    assert Settings.resolve(["serve"], {**image, "SAGEMAKER_BIND_TO_PORT": "9090"}).port == 9090
    assert Settings.resolve(["serve", "--port", "1"], {"SAGEMAKER_BIND_TO_PORT": "9090"}).port == 1
    assert Settings.resolve(["serve"], {}).graceful_termination_timeout == 25
    assert Settings.resolve(["serve"], {"GRACEFUL_TERMINATION_TIMEOUT": "10"}).graceful_termination_timeout == 10
    assert Settings.resolve(["serve", "-g", "9"], {}).graceful_termination_timeout == 9
    assert Settings.resolve([], {"SAGEMAKER_BIND_TO_PORT": "9090"}).port == 3000


def test_a_containers_hostname_is_not_an_address():
    assert Settings.resolve([], {"HOSTNAME": "3f2a"}).hostname == "0.0.0.0"
    assert Settings.resolve(["--hostname", "::1"], {}).hostname == "::1"


def test_what_changes_nothing_is_named_and_what_asks_for_the_usual_is_not():
    settings = Settings.resolve(["--quantize", "awq", "--speculate", "2", "--port", "1"], {})
    assert settings.without_effect({}) == ["--quantize", "--speculate"]
    usual = Settings.resolve(["--num-shard", "1", "--speculate", "0", "--usage-stats", "off"], {"CUDA_GRAPHS": "0"})
    assert usual.without_effect({}) == []


def _values(entry: Entry) -> st.SearchStrategy:
    """Every value that a setting can have."""
    field = next(field for field in dataclasses.fields(Settings) if field.name == entry.name)
    text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
    word = st.text("abc:/@.=-", min_size=1)
    kinds = {"integer": st.integers(1, int(field.metadata["most"] or 65535)), "size": st.integers(1, 1 << 50)}
    kinds |= {"number": st.floats(0.01, 1.0), "[boolean]": st.booleans(), "text": word if entry.many else text}
    if entry.name == "lora_adapters":
        adapters = st.from_regex(r"[a-c](/[a-c])?(@v1|=/[a-c@=]+|=s3://b)?", fullmatch=True)
        return st.lists(adapters, unique_by=lambda said: parse(said).name).map(tuple)
    one = st.sampled_from(field.metadata["choices"]) if field.metadata["choices"] else kinds[entry.kind.name]
    value = st.lists(one, min_size=1).map(tuple) if entry.many else one
    return st.one_of(st.just(entry.default), value)


@given(st.fixed_dictionaries({entry.name: _values(entry) for entry in entries() if entry.variable}))
def test_the_environment_makes_the_same_settings_again(values):
    if values["max_batch_total_tokens"] is not None:
        smaller = (values["max_total_tokens"] or 1, values["max_batch_prefill_tokens"] or 1)
        values["max_batch_total_tokens"] = max(values["max_batch_total_tokens"], 2, *smaller)
    if None not in (values["max_input_tokens"], values["max_total_tokens"]):
        values["max_total_tokens"] = max(2, values["max_total_tokens"])
        values["max_input_tokens"] = min(values["max_input_tokens"], values["max_total_tokens"] - 1)
    elif values["max_total_tokens"] == 1:
        values["max_total_tokens"] = 2
    if not (values["api_key"] or "").strip():
        values["api_key"] = None
    room = values["max_lora_adapters"]
    if room is not None:
        values["lora_adapters"] = values["lora_adapters"][:room]
    settings = Settings(**values)
    assert Settings.resolve([], settings.environment()) == settings


def test_only_the_settings_own_variables_are_taken_out_of_an_environment():
    environ = {"PATH": "/bin", "PORT": "80", "HF_MODEL_ID": "m", "MAX_INPUT_LENGTH": "3", "HOSTNAME": "h"}
    assert foreign(environ) == {"PATH": "/bin", "HOSTNAME": "h"}


def test_names_are_unique():
    names = [name for entry in entries() for name in (*entry.names, *filter(None, [entry.short]))]
    variables = [v for entry in entries() for v in (entry.variable, entry.sagemaker) if v]
    assert len(set(names)) == len(names)
    assert len(set(variables)) == len(variables)


def test_the_commands_start_light():
    """What stands between a command line and its answer: no torch, no web server, no event loop."""
    code = "import serving.__main__, sys; print(*sys.modules)"
    root = Path(__file__).parents[2]
    modules = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "flask", "gevent", "gunicorn", "pydantic", "numpy", "tokenizers"}
    assert not heavy & set(modules.stdout.split())


def test_under_serve_answers_are_cut_before_the_platform_gives_up():
    settings = Settings.resolve(["serve"], {"RESPONSE_DEADLINE": ""})
    assert (settings.response_deadline, settings.stream_deadline) == (55.0, 470.0)
    assert Settings.resolve([], settings.environment()) == settings
    settings = Settings.resolve(["serve", "--stream-deadline=30"], {"RESPONSE_DEADLINE": "0"})
    assert (settings.response_deadline, settings.stream_deadline) == (0.0, 30.0)
    assert Settings.resolve([], {}).response_deadline == 0.0


def test_a_batch_transform_is_not_cut_unless_told_so():
    settings = Settings.resolve(["serve"], {"SAGEMAKER_BATCH": "true"})
    assert (settings.response_deadline, settings.stream_deadline) == (0.0, 0.0)
    assert settings.graceful_termination_timeout == 25
    settings = Settings.resolve(["serve"], {"SAGEMAKER_BATCH": "true", "RESPONSE_DEADLINE": "9"})
    assert settings.response_deadline == 9.0


def test_there_is_room_for_the_adapters_that_are_named_unless_more_is_said():
    assert Settings.resolve([], {}).adapter_room == 0
    assert Settings.resolve([], {"LORA_ADAPTERS": "a,org/b@v1,c=/x"}).adapter_room == 3
    more = Settings.resolve(["--lora-adapters", "a"], {"SAGEMAKER_MAX_NUMBER_OF_ADAPTERS_IN_MEMORY": "9"})
    assert more.adapter_room == 9
    assert more.without_effect({}) == []
