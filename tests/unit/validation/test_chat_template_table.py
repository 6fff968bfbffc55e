"""Templates in the shapes that public models use render what transformers renders, character for character."""

import jinja2
import pytest
import tokenizers
from tokenizers import models

from serving.errors import TemplateError
from serving.tokenizer import Tokenizer
from serving.validation.chat_template import ChatTemplate, Conversation

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

CHATML = """\
{% for message in messages %}
    {% if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
    {% endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{% endif %}
"""

LLAMA = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- if tools is not none %}
    {%- if messages | length != 0 %}
        {%- set first_user_message = messages[0]['content']|trim %}
        {%- set messages = messages[1:] %}
    {%- else %}
        {{- raise_exception("There is no user message to put the tools into.") }}
    {%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' -}}
    {{- "Answer with a call of one of these:\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
    {{- first_user_message + "<|eot_id|>"}}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("One call at a time, please.") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""  # noqa: E501 - as such templates are

MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.role == "tool_results" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, conversation roles must alternate user/assistant/user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}
                        {{- ", " }}
                    {%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}
                    {{- ", " }}
                {%- else %}
                    {{- "]" }}
                {%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}
                {{- ", " }}
            {%- else %}
                {{- "]" + eos_token }}
            {%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- elif message["role"] == "tool_results" or message["role"] == "tool" %}
        {%- if message.content is defined and message.content.content is defined %}
            {%- set content = message.content.content %}
        {%- else %}
            {%- set content = message.content %}
        {%- endif %}
        {{- '[TOOL_RESULTS] {"content": ' + content|string + ", " }}
        {{- '"call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, with the exception of an initial optional system message!") }}
    {%- endif %}
{%- endfor %}
"""  # noqa: E501

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)

ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
"""

QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}
                    {{- '\\n' }}
                {%- endif %}
                {%- if tool_call.function %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '<tool_call>\\n{"name": "' }}
                {{- tool_call.name }}
                {{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""  # noqa: E501

# Of the kind that models of pictures have: parts only, and either form.
PARTS = """\
{{ bos_token }}{% for message in messages %}{{ message['role']|upper }}:
{%- for part in message['content'] if part['type'] == 'image' %} <image>{% endfor %}
{%- for part in message['content'] if part['type'] == 'text' %} {{ part['text'] }}{% endfor %}

{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"""
EITHER = """\
{%- macro said(content) %}
    {%- if content is string %}{{ content }}{% else %}{% for part in content %}[{{ part.text }}]{% endfor %}{% endif %}
{%- endmacro %}
{% for m in messages %}<{{ m.role }}>{{ said(m.content) }}
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""

COMMAND_DEFAULT = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% elif false == true %}{% set loop_messages = messages %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% if system_message != false %}{{ '<|SYSTEM|>' + system_message + '<|END|>' }}{% endif %}"
    "{% for message in loop_messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'user' %}{{ '<|USER|>' + content.strip() + '<|END|>' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|BOT|>' + content.strip() + '<|END|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|BOT|>' }}{% endif %}"
)
COMMAND_TOOLS = """\
{%- macro json_to_python_type(json_spec) %}
    {%- set basic_type_map = {"string": "str", "number": "float", "integer": "int", "boolean": "bool"} %}
    {%- if basic_type_map[json_spec.type] is defined %}{{- basic_type_map[json_spec.type] }}
    {%- elif json_spec.type == "array" %}{{- "List[" + json_to_python_type(json_spec.items) + "]" }}
    {%- else %}{{- "Any" }}{%- endif %}
{%- endmacro %}
{{- bos_token }}## Tools{{ '\\n' }}
{%- for tool in tools %}
    {%- set tool = tool.function if tool.function is defined else tool %}
    {{- "```python\\ndef " + tool.name + "(" }}
    {%- for name, fields in tool.parameters.properties.items() %}
        {%- if loop.index0 != 0 %}{{ ", " }}{% endif %}
        {{- name ~ ": " ~ json_to_python_type(fields) }}
    {%- endfor %}
    {{- '):\\n    \"\"\"' ~ tool.description ~ '\"\"\"\\n```\\n' }}
{%- endfor %}
{%- for message in messages %}{{ '<|' ~ message.role ~ '|>' ~ (message.content|default('', true))|trim ~ '<|END|>' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|BOT|>' }}{%- endif %}
"""  # noqa: E501

ARGUMENTS = {"city": "Zürich", "days": 2, "detail": None}
CALL = {"id": "call12345", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of <a> city & its 'surroundings'",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    }
]
USER, ASSISTANT = {"role": "user", "content": " Hello? "}, {"role": "assistant", "content": "  Hello.\n"}
SYSTEM = {"role": "system", "content": "Be <brief> & 'kind'.\n"}
RESULT = {"role": "tool", "tool_call_id": "call12345", "name": "weather", "content": '{"sky": "blue"}'}
THOUGHT = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."}
CONVERSATIONS = {
    "plain": [USER],
    "system": [SYSTEM, USER],
    "turns": [USER, ASSISTANT, {"role": "user", "content": "More"}, ASSISTANT, USER],
    "system and turns": [SYSTEM, USER, ASSISTANT, USER],
    "late system": [USER, SYSTEM],
    "two of the user": [USER, USER],
    "tools": [USER, {"role": "assistant", "tool_calls": [CALL]}, RESULT],
    "nulls": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, RESULT, ASSISTANT, USER],
    "two calls": [USER, {"role": "assistant", "tool_calls": [CALL, CALL]}, RESULT, RESULT],
    "call with words": [USER, {"role": "assistant", "content": "I look.", "tool_calls": [CALL]}, RESULT],
    "unicode": [{"role": "user", "content": "naïve 漢字 \U0001f600\u200d\u2028 \x00 {{ messages }} {% raw %}</s>"}],
    "thought": [USER, THOUGHT, {"role": "user", "content": "Sure?"}],
    "thought at the end": [USER, {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}, RESULT],
    "reasoning by its other name": [USER, {"role": "assistant", "content": "Yes.", "reasoning": "Hm."}, RESULT],
    "other roles": [{"role": "developer", "content": "d"}, USER],
    "empty": [{"role": "user", "content": ""}],
}
TEMPLATES = {
    "chatml": CHATML,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "zephyr": ZEPHYR,
    "qwen": QWEN,
    "either": EITHER,
    "command": {"default": COMMAND_DEFAULT, "tool_use": COMMAND_TOOLS},
}


def backend():
    made = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    made.add_special_tokens(list(SPECIAL.values()))
    return made


@pytest.fixture(scope="module")
def renderers(tmp_path_factory):
    """Per template: transformers' rendering and ours."""
    from transformers import PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("model")

    def made(template):
        named = template if isinstance(template, str) else [{"name": n, "template": t} for n, t in template.items()]
        reference = PreTrainedTokenizerFast(tokenizer_object=backend(), chat_template=template, **SPECIAL)
        ours = ChatTemplate.load(directory, Tokenizer(backend(), {**SPECIAL, "chat_template": named}))
        return reference, ours

    return {name: made(template) for name, template in {**TEMPLATES, "parts": PARTS}.items()}


def compare(renderer, messages, tools=None, given=None, **kwargs):
    """Hold our rendering to that of transformers, given other messages if so wished; tell whether it is a prompt."""
    reference, ours = renderer
    asked = {"add_generation_prompt": not kwargs.get("continue_final_message"), **kwargs}
    conversation = Conversation(messages=messages, tools=tools, template_kwargs=kwargs)
    failure = None
    try:
        expected = reference.apply_chat_template(given or messages, tools=tools, tokenize=False, **asked)
    except jinja2.TemplateError as error:
        failure = error.message
    except TypeError as error:
        failure = f"the template fails on these messages: {error}"
    if failure is None:
        assert ours.render(conversation) == expected
    else:
        with pytest.raises(TemplateError) as refused:
            ours.render(conversation)
        assert refused.value.detail == failure
    return failure is None


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["without tools", "with tools"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_prompt_is_that_of_transformers(renderers, template, conversation, tools):
    compare(renderers[template], CONVERSATIONS[conversation], tools)


def test_the_table_compares_prompts_and_not_only_errors(renderers):
    rendered = {
        name: sum(compare(renderers[name], messages, TOOLS) for messages in CONVERSATIONS.values())
        for name in TEMPLATES
    }
    assert min(rendered.values()) >= 4, rendered


@pytest.mark.parametrize(
    ("template", "kwargs"),
    [
        ("qwen", {"enable_thinking": False}),
        ("qwen", {"enable_thinking": True, "unread": [1, {"a": None}]}),
        ("llama", {"date_string": "21 Nov 2026"}),
        ("chatml", {"add_generation_prompt": False}),
        ("llama", {"documents": [{"title": "t", "text": "x"}]}),
    ],
)
def test_variables_of_the_request_reach_the_template(renderers, template, kwargs):
    assert compare(renderers[template], CONVERSATIONS["system"], **kwargs)


@pytest.mark.parametrize("content", ["I ", "I", "  I", "I\n\n", "naïve 漢字 I", "I I", "<think>\nHm.\n</think>\n\nY"])
@pytest.mark.parametrize("template", [*TEMPLATES, "parts"])
def test_the_last_message_is_continued_as_transformers_does(renderers, template, content):
    messages = [USER, {"role": "assistant", "content": content}]
    given = parted(messages) if template == "parts" else None
    assert compare(renderers[template], messages, given=given, continue_final_message=True)
    continued = Conversation(messages=messages, template_kwargs={"continue_final_message": True})
    _, ours = renderers[template]
    assert ours.render(Conversation(messages=messages)) == ours.render(continued)


def test_a_user_can_be_continued_too(renderers):
    assert compare(renderers["chatml"], [USER], continue_final_message=True)


def parted(messages, pieces=1):
    """The messages with their content cut in parts."""

    def parts(text):
        step = -(-len(text) // pieces) or 1
        return [{"type": "text", "text": text[at : at + step]} for at in range(0, len(text) or 1, step)]

    return [{**message, "content": parts(message["content"])} for message in messages]


@pytest.mark.parametrize("template", TEMPLATES)
def test_parts_are_joined_for_templates_that_take_texts(renderers, template):
    messages = [{"role": "user", "content": "One. Two."}]
    given = None if template == "either" else messages
    assert compare(renderers[template], parted(messages, 2), given=given)


def test_a_template_that_takes_parts_gets_parts(renderers):
    messages = [SYSTEM, USER, ASSISTANT, USER]
    assert compare(renderers["parts"], messages, given=parted(messages))
    assert compare(renderers["parts"], parted(messages, 3))
    assert compare(renderers["either"], parted(messages, 3))
    assert compare(renderers["either"], parted(messages, 3)[:3], continue_final_message=True)


def test_a_template_that_would_show_how_parts_are_written_gets_texts():
    shown = ChatTemplate("{{ messages[0].content | tojson }}", {})
    assert shown.render(Conversation(messages=parted([{"role": "user", "content": "One."}], 2))) == '"One."'


@pytest.mark.parametrize("template", ["llama", "qwen", "mistral"])
def test_arguments_written_as_json_are_objects_for_templates(renderers, template):
    _, ours = renderers[template]
    written = '{"city": "Z\\u00fcrich", "days": 2, "detail": null}'
    as_text = {**CALL, "function": {**CALL["function"], "arguments": written}}
    rendered = [
        ours.render(Conversation(messages=[USER, {"role": "assistant", "tool_calls": [call]}, RESULT]))
        for call in (CALL, as_text)
    ]
    assert rendered[0] == rendered[1]
    assert as_text["function"]["arguments"] == written
