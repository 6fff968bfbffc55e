"""Chat templates render as transformers renders them, and a bad one is stopped."""

import json
import time
from datetime import datetime

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from serving.errors import ConfigurationError, ModelError, TemplateError, ValidationError
from serving.tokenizer import Tokenizer
from serving.validation.chat_template import ChatTemplate, Conversation

BLOCKS = """{%- set ns = namespace(first=true) %}
{{ bos_token }}
{% for message in messages %}
    {% if message['role'] == 'system' %}
        {% continue %}
    {% endif %}
    {% if loop.first or ns.first %}
<|begin|>
    {% set ns.first = false %}
    {% endif %}
<|{{ message.role }}|>
{{ message.content | trim }}{{ eos_token }}
    {% if loop.index > 3 %}{% break %}{% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}"""
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% generation %}{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
JSON = """{% for message in messages %}
{{ message | tojson }} {{ message | tojson(indent=2) }}
{% endfor %}
{{ {'b': "<é&'>", 'a': [1, 2.5, none, true]} | tojson }}{{ tools is none }}{{ documents is defined }}
{{- pad_token }}{{ undefined_thing }}{{ messages[::-1][0].role }}{{ messages | length }}"""
MACROS = """{% macro turn(message, last) %}
  [{{ message.role|upper }}{{ ' final' if last }}] {{ message.content.split('\\n')[0].strip() }}
{% endmacro %}
{%- for message in messages %}{{ turn(message, loop.last) }}{{ loop.length }}{{ loop.previtem is defined }}{% endfor %}
{%- set text %}captured {{ messages[0].content }}{% endset %}{{ text ~ '!' ~ 3 * 2 ~ '-' * 3 ~ 2 ** 5 }}"""
CONVERSATIONS = [
    [{"role": "user", "content": "Hi <b> & 'you'"}],
    [{"role": "system", "content": "S"}, {"role": "user", "content": " é\n"}],
    [
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "tool", "content": "d", "name": "f"},
        {"role": "user", "content": "e"},
    ],
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def backend():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(SPECIAL.values()))
    return made


@pytest.mark.parametrize("source", [BLOCKS, CHATML, JSON, MACROS], ids=["blocks", "chatml", "json", "macros"])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_it_renders_what_transformers_renders(source, messages):
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast(tokenizer_object=backend(), chat_template=source, **SPECIAL)
    expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate(source, SPECIAL).render(Conversation(messages=messages)) == expected


def render(source, content="hi", **bounds):
    messages = [{"role": "user", "content": content}]
    return ChatTemplate(source, {}, **bounds).render(Conversation(messages=messages))


def test_the_date_can_be_asked_for():
    assert render("{{ strftime_now('%Y') }}") in {str(datetime.now().year), str(datetime.now().year - 1)}


@pytest.mark.parametrize(
    ("messages", "rendered"),
    [
        ([{"role": "assistant", "content": "so far "}], "<assistant>so far "),
        ([{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "a"}], "<assistant>a|<assistant>a"),
        ([{"role": "assistant", "content": ""}], "<assistant>"),
        ([{"role": "user", "content": "so far"}], "<user>so far|<assistant>"),
    ],
)
def test_a_last_message_of_the_assistant_is_continued(messages, rendered):
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}|{% endfor %}<assistant>"
    assert ChatTemplate(source, {}).render(Conversation(messages=messages)) == rendered


@pytest.mark.parametrize("content", [" x ", "x", " m\n"])
def test_a_template_that_strips_content_is_continued_too(content):
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<|im_end|>{% endfor %}"
    assert (
        ChatTemplate(source, {}).render(Conversation(messages=[{"role": "assistant", "content": content}]))
        == f"<assistant>{content.strip()}"
    )


def test_continuing_leaves_the_messages_as_they_are():
    messages = [{"role": "assistant", "content": "so far"}]
    ChatTemplate("{{ messages[0].content }}", {}).render(Conversation(messages=messages))
    assert messages == [{"role": "assistant", "content": "so far"}]


def test_a_template_that_hides_the_last_message_is_not_cut():
    assert ChatTemplate("fixed", {}).render(Conversation(messages=[{"role": "assistant", "content": "i"}])) == "fixed"


@pytest.mark.parametrize(
    ("source", "detail"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages[0].content.a.b }}", "'str object' has no attribute 'a'"),
        ("{{ 'x' + none }}", "the template fails on these messages"),
        ("{{ messages[0].content + 1 }}", "the template fails on these messages"),
        ("{{ 1 / 0 }}", "the template fails on these messages"),
        ("{{ messages['x']['y'] }}", "'list object' has no attribute 'x'"),
        ("{% for x in 1 %}{% endfor %}", "the template fails on these messages"),
        ("{{ messages.append(1) }}", ""),
        ("{{ messages.__class__ }}{{ ''.__class__.__base__.__subclasses__() }}", "access to attribute"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "the template fails on these messages"),
        ("{{ messages[0].content.encode('ascii') }}", "the template fails on these messages"),
    ],
)
def test_what_fails_is_a_template_error(source, detail):
    with pytest.raises(TemplateError) as failure:
        render(source, "é")
    assert failure.value.detail.startswith(detail)
    assert "/" not in failure.value.detail


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}"


@pytest.mark.parametrize(
    "source",
    [
        LOOP + "{% endfor %}{% endfor %}",
        LOOP + "x{% endfor %}{% endfor %}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% for a in messages[0].content %}{% for b in messages[0].content %}{% for c in messages[0].content %}"
        "{% endfor %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n - 1) + f(n - 1) if n }}{% endmacro %}{{ f(100) }}",
        "{% set ns = namespace(x='ab') %}" + LOOP + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x=2) %}" + LOOP + "{% set ns.x = ns.x * ns.x %}{% endfor %}{% endfor %}",
        "{% set x = 'ab' * 10**10 %}",
        "{{ [1] * 10**10 }}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ 2 ** 99999999 }}",
        "{% for i in range(99999) %}0123456789{% endfor %}",
    ],
)
def test_a_runaway_template_is_stopped(source):
    begun = time.monotonic()
    with pytest.raises(TemplateError):
        render(source, "ab" * 1000, time_limit_s=0.2, max_characters=100_000)
    assert time.monotonic() - begun < 5


def test_a_captured_block_is_measured():
    source = "{% set x = 'ab' * 40 %}{% for i in range(9) %}{% set x %}{{ x * 2 }}{% endset %}{% endfor %}"
    assert render(source, max_characters=200) == ""
    with pytest.raises(TemplateError):
        render(source.replace("* 2", "* 3"), max_characters=200)


def test_a_template_that_cannot_be_compiled_is_the_models_fault():
    with pytest.raises(ModelError, match="cannot be compiled"):
        ChatTemplate("{% for %}", {})


def load(directory, config):
    return ChatTemplate.load(directory, Tokenizer(backend(), config))


def test_where_the_template_is_looked_for(tmp_path):
    config = {
        "chat_template": "config{{ bos_token }}{{ pad_token }}",
        "bos_token": "<s>",
        "pad_token": {"content": "p"},
    }
    assert load(tmp_path, {}) is None
    assert load(tmp_path, config).render(Conversation(messages=[])) == "config<s>p"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert load(tmp_path, config).render(Conversation(messages=[])) == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert load(tmp_path, config).render(Conversation(messages=[])) == "jinja"
    (tmp_path / "other.json").write_text(json.dumps({"chat_template": "other"}))
    other = ChatTemplate.load(tmp_path, Tokenizer(backend(), config), tmp_path / "other.json")
    assert other is not None
    assert other.render(Conversation(messages=[])) == "other"


CHAT, TOOLS = (
    {"name": "default", "template": "chat"},
    {"name": "tool_use", "template": "{{ tools[0].n }}{{ bos_token }}"},
)
WITH_TOOLS = Conversation(messages=[], tools=[{"n": "f"}])


def test_of_named_templates_the_default_is_taken_and_tool_use_for_tools(tmp_path):
    rag = {"name": "rag", "template": "rag"}
    named = load(tmp_path, {"chat_template": [rag, CHAT, TOOLS], "bos_token": "<s>"})
    assert named.render(Conversation(messages=[])) == "chat"
    assert named.render(WITH_TOOLS) == "f<s>"
    assert named.source == TOOLS["template"]
    assert load(tmp_path, {"chat_template": [rag, CHAT]}).render(WITH_TOOLS) == "chat"
    assert load(tmp_path, {"chat_template": {"default": "chat"}}).render(WITH_TOOLS) == "chat"
    assert load(tmp_path, {"chat_template": [rag]}) is None
    assert load(tmp_path, {"chat_template": 7}) is None


def test_templates_in_files_of_their_own_have_the_names_of_the_files(tmp_path):
    from transformers import PreTrainedTokenizerFast

    templates = {"default": "chat{{ messages[0].content }}", "tool_use": TOOLS["template"], "rag": "{% broken"}
    PreTrainedTokenizerFast(tokenizer_object=backend(), chat_template=templates, **SPECIAL).save_pretrained(tmp_path)
    assert (tmp_path / "additional_chat_templates" / "tool_use.jinja").is_file()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    found = load(tmp_path, {"chat_template": "config", **SPECIAL})
    assert found.render(Conversation(messages=[{"role": "user", "content": "!"}])) == "chat!"
    assert found.render(WITH_TOOLS) == "f<s>"


def test_the_processors_template_is_the_last_to_be_taken(tmp_path):
    (tmp_path / "processor_config.json").write_text(json.dumps({"chat_template": "processor"}))
    assert load(tmp_path, {}).render(Conversation(messages=[])) == "processor"
    assert load(tmp_path, {"chat_template": "config"}).render(Conversation(messages=[])) == "config"


def test_tokens_come_from_the_configuration_that_the_operator_names(tmp_path):
    source = "{{ bos_token }}{{ eos_token }}{{ image_token }}"
    config = {"chat_template": source, "bos_token": "<s>", "eos_token": "</s>"}
    extra = {**config, "extra_special_tokens": {"image_token": {"content": "<pad>"}}}
    (tmp_path / "other.json").write_text(json.dumps({"chat_template": source, "bos_token": {"content": "<mine>"}}))
    assert load(tmp_path, extra).render(Conversation(messages=[])) == "<s></s><pad>"
    other = ChatTemplate.load(tmp_path, Tokenizer(backend(), config), tmp_path / "other.json")
    assert other is not None
    assert other.render(Conversation(messages=[])) == "<mine></s>"


def test_the_operators_template_comes_before_all(tmp_path):
    tokenizer = Tokenizer(backend(), {"chat_template": "config", **SPECIAL})
    (tmp_path / "chat_template.jinja").write_text("jinja")
    (tmp_path / "mine.jinja").write_text("from a file{{ bos_token }}\n")
    (tmp_path / "mine.json").write_text(json.dumps({"chat_template": [CHAT, TOOLS]}))

    def rendered(override, conversation=WITH_TOOLS):
        made = ChatTemplate.load(tmp_path, tokenizer, override=override)
        assert made is not None
        return made.render(conversation)

    assert rendered("mine{{ eos_token }}") == "mine</s>"
    assert rendered(str(tmp_path / "mine.jinja")) == "from a file<s>"
    assert rendered(str(tmp_path / "mine.json")) == "f<s>"
    for missing in (str(tmp_path / "missing.jinja"), "chatml"):
        with pytest.raises(ConfigurationError, match="`chat_template` is neither a template nor the path of one"):
            rendered(missing)
    (tmp_path / "empty.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="there is no template in"):
        rendered(str(tmp_path / "empty.json"))


def test_what_a_template_reads_is_known():
    template = ChatTemplate("{{ tools }}{% set documents = 1 %}{{ documents }}{# thinking #}", {})
    assert template.mentions("tools")
    assert not template.mentions("documents")
    assert not template.mentions("thinking")
    assert ChatTemplate("plain", {}, tool_source="{{ tools }}").mentions("tools")


ROLES = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ '<assistant>' if add_generation_prompt }}"
ASKED, BEGUN = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b "}


@pytest.mark.parametrize(
    ("messages", "kwargs", "rendered"),
    [
        ([ASKED], {}, "<user>a<assistant>"),
        ([ASKED], {"add_generation_prompt": False}, "<user>a"),
        ([ASKED], {"continue_final_message": True}, "<user>a"),
        ([ASKED, BEGUN], {}, "<user>a<assistant>b "),
        ([ASKED, BEGUN], {"add_generation_prompt": True}, "<user>a<assistant>b <assistant>"),
        ([ASKED, BEGUN], {"continue_final_message": False}, "<user>a<assistant>b <assistant>"),
        ([ASKED, BEGUN], {"continue_final_message": False, "add_generation_prompt": False}, "<user>a<assistant>b "),
        ([ASKED, BEGUN], {"continue_final_message": None}, "<user>a<assistant>b "),
        ([ASKED, {**BEGUN, "tool_calls": [{}]}], {}, "<user>a<assistant>b <assistant>"),
    ],
)
def test_how_the_prompt_ends_can_be_said(messages, kwargs, rendered):
    conversation = Conversation(messages=messages, template_kwargs=kwargs)
    assert ChatTemplate(ROLES, {}).render(conversation) == rendered


def test_variables_of_the_request_cannot_replace_what_the_sandbox_gives():
    template = ChatTemplate("{{ thinking }} {{ range(2) | list }} {{ raise_exception is callable }}", {})
    kwargs = {"thinking": "on", "range": 1, "raise_exception": "x", "self": 1, "read_by_no_template": 1}
    assert template.render(Conversation(messages=[ASKED], template_kwargs=kwargs)) == "on [0, 1] True"


@pytest.mark.parametrize(
    ("kwargs", "detail"),
    [
        ({"messages": []}, "`chat_template_kwargs` must not set `messages`"),
        ({"tools": []}, "`chat_template_kwargs` must not set `tools`"),
        ({"bos_token": "x"}, "`chat_template_kwargs` must not set `bos_token`"),
        ({"image_token": "x"}, "`chat_template_kwargs` must not set `image_token`"),
        ({"chat_template": "x"}, "`chat_template_kwargs` must not set `chat_template`"),
        ({"add_generation_prompt": 1}, "`add_generation_prompt` in `chat_template_kwargs` must be a boolean"),
        ({"continue_final_message": "content"}, "`continue_final_message` in `chat_template_kwargs` must be a boolean"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "`add_generation_prompt` and `continue_final_message` exclude each other",
        ),
    ],
)
def test_what_variables_of_the_request_cannot_be(kwargs, detail):
    with pytest.raises(ValidationError) as refused:
        ChatTemplate(ROLES, {"image_token": "i"}).render(Conversation(messages=[ASKED], template_kwargs=kwargs))
    assert refused.value.detail == detail


def test_only_what_is_there_can_be_continued():
    continued = {"continue_final_message": True}
    for messages in ([], [{"role": "assistant", "tool_calls": [{}]}]):
        with pytest.raises(ValidationError, match="needs a last message with content"):
            ChatTemplate(ROLES, {}).render(Conversation(messages=messages, template_kwargs=continued))
    with pytest.raises(TemplateError, match="hides the end of the last message"):
        ChatTemplate("fixed", {}).render(Conversation(messages=[BEGUN], template_kwargs=continued))


@pytest.mark.parametrize("arguments", ["", "{}"])
def test_a_call_without_arguments_has_an_empty_object(arguments):
    source = "{% for c in messages[0].tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}"
    call = {"function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "assistant", "tool_calls": [call]}]
    assert ChatTemplate(source, {}).render(Conversation(messages=messages)) == "{}"


@pytest.mark.parametrize("arguments", ["no json", "[1]", '"text"', "{", "[" * 100_000, "9" * 5000])
def test_arguments_that_are_no_object_stay_as_they_are(arguments):
    source = "{% for c in messages[0].tool_calls %}{{ c.function.arguments }}{% endfor %}"
    messages = [{"role": "assistant", "tool_calls": [{"function": {"arguments": arguments}}]}]
    assert ChatTemplate(source, {}).render(Conversation(messages=messages)) == arguments


@pytest.mark.parametrize("calls", [[None], ["x"], [{"function": None}], [{"function": {"arguments": 1}}], "x", {}])
def test_calls_of_no_known_shape_reach_the_template(calls):
    messages = [{"role": "assistant", "tool_calls": calls}, ASKED]
    assert ChatTemplate(ROLES, {}).render(Conversation(messages=messages)) == "<assistant><user>a<assistant>"


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "chat_template.json").write_text("{")
    with pytest.raises(ModelError, match=r"chat_template\.json"):
        load(tmp_path, {})
