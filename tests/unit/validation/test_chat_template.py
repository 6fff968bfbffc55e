"""Chat templates render as transformers renders them, and a bad one is stopped."""

import json
import time
from datetime import datetime

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from serving.errors import ModelError, TemplateError
from serving.tokenizer import Tokenizer
from serving.validation.chat_template import ChatTemplate

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
    assert ChatTemplate(source, SPECIAL).render(messages) == expected


def render(source, content="hi", **bounds):
    return ChatTemplate(source, {}, **bounds).render([{"role": "user", "content": content}])


def test_the_date_can_be_asked_for():
    assert render("{{ strftime_now('%Y') }}") in {str(datetime.now().year), str(datetime.now().year - 1)}


@pytest.mark.parametrize(
    ("messages", "rendered"),
    [
        ([{"role": "assistant", "content": "so far "}], "<assistant>so far"),
        ([{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "a"}], "<assistant>a|<assistant>a"),
        ([{"role": "assistant", "content": ""}], "<assistant>"),
        ([{"role": "user", "content": "so far"}], "<user>so far|<assistant>"),
    ],
)
def test_a_last_message_of_the_assistant_is_continued(messages, rendered):
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}|{% endfor %}<assistant>"
    assert ChatTemplate(source, {}).render(messages) == rendered


@pytest.mark.parametrize("content", [" x ", "x", " m\n"])
def test_a_template_that_strips_content_is_continued_too(content):
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<|im_end|>{% endfor %}"
    assert (
        ChatTemplate(source, {}).render([{"role": "assistant", "content": content}]) == f"<assistant>{content.strip()}"
    )


def test_continuing_leaves_the_messages_as_they_are():
    messages = [{"role": "assistant", "content": "so far"}]
    ChatTemplate("{{ messages[0].content }}", {}).render(messages)
    assert messages == [{"role": "assistant", "content": "so far"}]


def test_a_template_that_hides_the_last_message_is_not_cut():
    assert ChatTemplate("fixed", {}).render([{"role": "assistant", "content": "i"}]) == "fixed"


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
    assert load(tmp_path, config).render([]) == "config<s>p"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert load(tmp_path, config).render([]) == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert load(tmp_path, config).render([]) == "jinja"
    (tmp_path / "other.json").write_text(json.dumps({"chat_template": "other"}))
    other = ChatTemplate.load(tmp_path, Tokenizer(backend(), config), tmp_path / "other.json")
    assert other is not None
    assert other.render([]) == "other"


def test_of_named_templates_the_default_is_taken(tmp_path):
    named = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "chat"}]
    assert load(tmp_path, {"chat_template": named}).render([]) == "chat"
    assert load(tmp_path, {"chat_template": named[:1]}) is None


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "chat_template.json").write_text("{")
    with pytest.raises(ModelError, match=r"chat_template\.json"):
        load(tmp_path, {})
