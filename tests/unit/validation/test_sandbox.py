"""The sandbox stops every template that runs long, makes much or reaches out, and changes nothing for the others."""

import json
import subprocess
import sys

import jinja2.ext
import jinja2.sandbox
import pytest

from serving.errors import ModelError, TemplateError
from serving.validation.chat_template import ChatTemplate, Conversation

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}"
END = "{% endfor %}{% endfor %}"
BIG = "{% set b = 'abcdefgh' * 900000 %}"
WIDE = "{% set b = 'ab\U0001f600h' * 900000 %}"
NESTED = "{% set ns = namespace(x=['a'], y=['a']) %}{% for i in range(64) %}"
BAD_EXPRESSIONS = [
    "'%1000000000d' % 1",
    "'%.1000000000f' % 1",
    "'%*d' % (1000000000, 1)",
    "'%((a)b)1000000000d' % {'(a)b': 1}",
    "('%1000000000d'|safe) % 1",
    "'a%1000000000d'.encode() % 1",
    "'%1000000000d'|format(1)",
    "'x'.ljust(1000000000)",
    "'x'.center(1000000000)",
    "('a'|safe).center(1000000000)",
    "'a'.encode().rjust(1000000000)",
    "'x'|center(1000000000)",
    "['x']|map('center', 1000000000)|list",
    "'x'.zfill(10**9)",
    "('\\t' * 1000).expandtabs(10**7)",
    "('a\\n' * 1000)|indent(10**7)",
    "'{:1000000000}'.format(1)",
    "'{:{}}'.format(1, 1000000000)",
    "('{:1000000000}'|attr('format'))(1)",
    "('{:1000000000}'|safe).format(1)",
    "'ab' * 10**10",
    "[1] * 10**10",
    "('a'|safe) * 10**10",
    "'a'.encode() * 10**10",
    "10 ** (10 ** 10)",
    "2 ** 99999999",
    "5|round(-1000000000)",
    "5|round(1000000000, 'ceil')",
    "(1).to_bytes(10**9, 'big')",
    "range(10**9)|list",
    "[1]|batch(1000000000, 0)|list",
    "[1]|slice(1000000000)|list",
    "([range(99999)|list] * 20)|sum(start=[])",
    "([range(999)|list] * 2000)|sum(start=[])|length",
    "range(99999)|list|pprint",
    "('é' * 1000000).encode('idna')",
    "('é' * 1000000).encode('punycode')",
    "('a' * 4000000).rfind('b' ~ 'a' * 2000000)",
    "('a' * 4000000).rsplit('b' ~ 'a' * 2000000)",
    "('a' * 4000000).strip('b' * 4000000 ~ 'a')",
    "('a' * 4000000)|trim('b' * 4000000 ~ 'a')",
    "('<a>' * 1000000)|striptags",
    "('a\\n' * 3900000).splitlines()|length",
    "('a' * 4000000)|wordwrap(1)",
    "(range(99999)|list)|sort(attribute='a.' * 100000 ~ 'b')",
    "(range(99999)|list)|map(attribute='a.' * 100000 ~ 'b')|list",
    "[1]|tojson(indent=10**9)",
    "lipsum(1000000)",
]
BAD_WITH_BIG = [
    "('%(a)s' * 100000) % {'a': b}",
    "('a\\n' * 1000)|indent(b)",
    "('{0}' * 100000).format(b)",
    "('{a}' * 100000).format_map({'a': b})",
    "b.join(['a'] * 100000)",
    "range(99999)|join(b)",
    "(range(99999)|map(attribute='x', default=b)|list)|string|length",
    "b.replace('a', b)",
    "b|replace('', b)",
    "b.translate({97: b})",
    "b|title",
    "b|urlize",
    "('a ' * 9000)|wordwrap(1, wrapstring=b)",
    "range(999)|list|tojson(separators=(b, b))",
    "strftime_now(b)",
    "raise_exception(b)",
    "{}[b].x",
    "(" + " ~ ".join(["b"] * 500) + ")|length",
    "(" + " + ".join(["b"] * 100) + ")|length",
]
BAD_WITH_WIDE = [
    "b|list|length",
    "b.split('h')|length",
    "b.maketrans(b, b)",
    "{}.fromkeys(b)",
    "dict.fromkeys(b)",
    "b|urlencode",
    "b|tojson(ensure_ascii=true)",
]
BAD = [
    *(f"{{{{ {expression} }}}}" for expression in BAD_EXPRESSIONS),
    *(f"{BIG}{{{{ {expression} }}}}" for expression in BAD_WITH_BIG),
    *(f"{WIDE}{{{{ {expression} }}}}" for expression in BAD_WITH_WIDE),
    LOOP + "{% set x = 'x'|center(7000000) %}" + END,
    "{% set ns = namespace(x='a') %}" + LOOP + "{% set ns.x = ns.x.replace('a', 'aaaaaaaaaa') %}" + END,
    BIG + "{% set c = 'abcdefgh' * 900000 %}" + LOOP + "{% if b == c %}{% endif %}" + END,
    # containers that are small and long when they are written out or compared
    NESTED + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    NESTED + "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}",
    NESTED + "{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x|tojson }}",
    NESTED + "{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x|tojson }}",
    NESTED + "{% set v = dict(a=ns.x).values() %}{% set ns.x = [v, v] %}{% endfor %}{{ ns.x }}",
    NESTED + "{% set ns.x = cycler(ns.x, ns.x).items %}{% endfor %}{{ ns.x }}",
    NESTED + "{% for y in [1]|batch(2, ns.x) %}{% set ns.x = [y, y] %}{% endfor %}{% endfor %}{{ ns.x }}",
    NESTED + "{% set ns.x = [{'k': ns.x}, {'k': ns.x}]|groupby('k') %}{% endfor %}{{ ns.x }}",
    "{% macro f(n) %}{{ f(n - 1, varargs, varargs) if n else varargs }}{% endmacro %}{{ f(60, 1) }}",
    "{% set ns = namespace() %}{% set ns.x = ns %}{% set ns.y = [ns] %}" + LOOP + "{{ ns.y }}" + END,
    "{% set ns = namespace(x=[1]) %}{% for i in range(400) %}{% set ns.x = [ns.x, 1] %}{% endfor %}"
    "{% set y = [ns.x] * 500 %}{{ y|tojson(indent=60) }}",
    # what is kept
    "{% set ns = namespace(l=[]) %}" + LOOP + "{% set ns.l = ns.l + ['a' * 4000000 ~ i] %}" + END,
    BIG + "{% set ns = namespace(l=[]) %}" + LOOP + "{% set ns.l = ns.l + [b[i:]] %}" + END,
    "{% set ns = namespace(l=[]) %}" + LOOP + "{% set ns.l = [ns.l, [i ~ j, j ~ '-' ~ i]] %}" + END,
    BIG + "{% macro f() %}" + LOOP + "{{ b }}" + END + "{% endmacro %}{{ f() }}",
    "{% set l = ['abcdefgh'] * 200000 %}{% macro f() %}" + LOOP + "{{ l }}" + END + "{% endmacro %}{{ f() }}",
    BIG + "{% set x %}" + LOOP + "{{ b }}" + END + "{% endset %}",
    "{% filter center(1000000000) %}a{% endfilter %}",
    BIG
    + "{% autoescape true %}{% macro f() %}"
    + LOOP
    + "{{ b }}"
    + END
    + "{% endmacro %}{{ f() }}{% endautoescape %}",
    # what calls itself
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{{ f(n - 1) + f(n - 1) if n }}{% endmacro %}{{ f(100) }}",
    "{% for x in [1, 1] recursive %}{{ loop([1, 1, 1]) }}{% endfor %}",
    "{% macro f() %}{{ caller() }}{% call f() %}{% endcall %}{% endmacro %}{% call f() %}{% endcall %}",
    "{% block a %}{{ self.a() }}{% endblock %}",
    # what Python cannot compile, or may not compute to compile
    "{{ " + "(" * 90000 + "1" + ")" * 90000 + " }}",
    "{{ " + "[" * 20000 + "]" * 20000 + " }}",
    "{{ " + "not " * 40000 + "1 }}",
    "{% for i in [1] %}" * 60 + "{% endfor %}" * 60,
    "{{ 0x" + "f" * 120000 + " // 0x" + "7" * 60000 + " }}",
    "a" * 1_000_000,
    BIG + "{% set c = 'abcdefgh' * 900000 %}" + "{% if b == c %}{% endif %}" * 7000,
]
RUNNER = """
import json, resource, sys, time
from serving.errors import ModelError, TemplateError
from serving.validation.chat_template import ChatTemplate, Conversation

conversation = Conversation(messages=[{"role": "user", "content": "ab" * 1000}])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
before = peak()
for source in json.load(sys.stdin):
    begun = time.monotonic()
    try:
        end = "rendered " + repr(ChatTemplate(source, {}, time_limit_s=0.3).render(conversation)[:60])
    except (TemplateError, ModelError) as error:
        end = "refused"
    print(json.dumps([end, time.monotonic() - begun, peak() - before]), flush=True)
"""


def test_a_hostile_template_ends_soon_and_takes_little_memory():
    done = subprocess.run(
        [sys.executable, "-c", RUNNER], input=json.dumps(BAD), capture_output=True, text=True, timeout=300, check=True
    )
    ends = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(ends) == len(BAD)
    assert [source[:200] for source, (end, _, _) in zip(BAD, ends, strict=True) if end != "refused"] == []
    assert [source[:200] for source, (_, seconds, _) in zip(BAD, ends, strict=True) if seconds > 10] == []
    assert ends[-1][2] < 300, "megabytes at the peak"


def render(source, content="hi"):
    return ChatTemplate(source, {}).render(Conversation(messages=[{"role": "user", "content": content}]))


@pytest.mark.parametrize(
    "expression",
    [
        "messages.append(1)",
        "messages.clear()",
        "messages[0].update(a=1)",
        "messages[0].pop('content')",
        "dict.pop(messages[0], 'content')",
        "''.__class__.__mro__",
        "messages.__class__.__base__.__subclasses__()",
        "(''|attr('__class__')).__mro__",
        "'{0.__class__.__mro__}'.format(1)",
        "'{a.__class__.__mro__}'.format_map({'a': 1})",
        "raise_exception.__globals__['sys']",
        "cycler.__init__.__globals__.os",
        "namespace(__class__=1)",
        "namespace(a=1)._Namespace__attrs.b",
        "dict.__init__.__globals__",
        "dict._sandbox.meter.x",
        "self._TemplateReference__context.environment.x",
        "messages[0].items().mapping.keys()",
    ],
)
def test_nothing_is_changed_or_reached(expression):
    with pytest.raises(TemplateError) as refused:
        render(f"{{{{ {expression} }}}}")
    assert len(refused.value.detail) < 1100


def test_what_a_macro_writes_is_charged_before_it_is_joined():
    source = (
        "{% set l = ['abcdefgh'] * 200000 %}{% macro f() %}{% for i in range(40) %}{{ l }}{% endfor %}{% endmacro %}"
    )
    with pytest.raises(TemplateError, match="the template uses too much memory"):
        ChatTemplate(source + "{{ f() }}", {}, time_limit_s=60).render(Conversation(messages=[]))


@pytest.mark.parametrize("tag", ["{% include '/etc/hostname' %}", "{% import 'os' as os %}", "{% extends 'a' %}"])
def test_no_file_is_read(tag):
    with pytest.raises(TemplateError):
        render(tag)


def test_a_namespace_keeps_its_underscores():
    with pytest.raises((TemplateError, ModelError)):
        render("{% set ns = namespace() %}{% set ns.__class__ = 1 %}")


@pytest.mark.parametrize(
    "expression",
    [
        "'%5.2f|%s|%-4d' % (1.234, [1, 'b'], 7)",
        "'%(a)s %(b)05d %%' % {'a': 'x', 'b': 7}",
        "'%s' % 'one'",
        "'%s-%s'|format('a', 2)",
        "'{} {:>5}|{a[b]}|{a[b][0]:*^9}'.format(1, 'é', a={'b': 'xy'})",
        "'{a}{b!r}'.format_map({'a': 1, 'b': 'q'})",
        "'a b  c'.split()",
        "'a,b,c'.split(',', 1)",
        "'a,b,c'.rsplit(',', maxsplit=1)",
        "'a\\nb\\r\\nc'.splitlines(true)",
        "'-'.join(['a', 'b'])",
        "'-'.join('abc')",
        "'-'.join(['a', 'b']|map('upper'))",
        "['a', 1, none, 2.5]|join(', ')",
        "messages|join('|', attribute='role')",
        "messages|map(attribute='content')|join",
        "{'b': 1, 'a': 2}|dictsort",
        "{'b': 1, 'a': 2}.items()|list",
        "[3, 1, 2]|sort(reverse=true)",
        "[1, 2, 3]|sum",
        "[[1], [2, 3]]|sum(start=[])",
        "[{'n': 1}, {'n': 2}]|sum(attribute='n')",
        "[1, 2, 3, 4, 5]|batch(2, 0)|list",
        "[1, 2, 3, 4, 5]|slice(2)|list",
        "[{'k': 'a', 'v': 1}, {'k': 'b'}, {'k': 'a'}]|groupby('k')|list",
        "['b', 'a', 'B']|unique|list",
        "['b', 'a']|min ~ ['b', 'a']|max",
        "[1, 2, 3]|select('odd')|list",
        "[1, 2, 3]|reject('in', [1])|list",
        "messages|selectattr('role', 'equalto', 'user')|list|length",
        "'some words here'|wordcount",
        "'some words here'|wordwrap(6)",
        "'some words here'|truncate(9, true)",
        "'some words'|title",
        "'a\\nb\\n\\nc'|indent(2, true, true)",
        "'a\\nb'|indent('> ')",
        "'x'|center(7)",
        "'xaax'.strip('x') ~ 'xaax'|trim('x')",
        "'aXbX'.replace('X', '--', 1) ~ 'aXbX'|replace('X', '')",
        "'<b>a</b> <!-- c -->'|striptags",
        "'<a>'|e ~ ('<b>'|safe + '<')",
        "'é'.encode('utf-8').decode('utf_8')",
        "'a/b c&'|urlencode",
        "{'a': 1, 'b': 'c d'}|urlencode",
        "2.567|round(1) ~ 2.567|round(1, 'floor') ~ 41|round",
        "[7 // 2, 7 % 4, 2 ** 10, 7 / 2, -3 * 2, 5 - 7, [1] * 2, 2 * 'ab', [1] + [2], (1,) + (2,), 'a' + 'b']",
        "'abc'[1:] ~ [1, 2, 3][::-1] ~ 'abc'[-1]",
        "1 < 2 < 3 and 'b' in 'abc' and 'a' not in ['b'] and 3 in range(4)",
        "[1, [2, {'a': (3, none)}]]",
        "none ~ true ~ 1.0 ~ undefined_name",
        "dict(a=1, **{'b': 2})",
        "dict.fromkeys(['a', 'b'], 0)",
        "[1, 2]|first ~ [1, 2]|last ~ 'abc'|reverse ~ [1, 2]|reverse|list",
        "'12'|int + '1.5'|float + 'x'|int(3) + 'ff'|int(0, 16)",
        "123456|filesizeformat",
        "[1, {'a': 'b'}]|pprint",
        "'a'.ljust(3) ~ 'b'.zfill(3) ~ '\\t'.expandtabs(2)",
        "'abc'|list",
        "{'a': 1}|items|list",
        "{'id': 'x', 'b': none}|xmlattr",
    ],
)
def test_what_is_allowed_computes_what_jinja2_computes(expression):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a\nb"}]
    plain = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    source = f"{{{{ {expression} }}}}"
    ours = ChatTemplate(source, {}).render(
        Conversation(messages=messages, template_kwargs={"continue_final_message": False})
    )
    assert ours == plain.from_string(source).render(messages=messages)


@pytest.mark.parametrize(
    "source",
    [
        "{% for c in 'abc' %}{{ loop.index }}/{{ loop.length }}{{ c }}{% if loop.last %}.{% endif %}{% endfor %}",
        "{% for a in [[1, [2]], [3]] recursive %}{{ a if a is number else loop(a) }},{% endfor %}",
        "{% set x %}<{{ messages[0].content }}>{% endset %}{{ x }}{{ x|length }}",
        "{% macro m(a, b=[1]) %}{{ a }},{{ b }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ m(1) }}"
        "{{ m(1, 2, [3], d=4) }}",
        "{% macro m() %}[{{ caller('x') }}]{% endmacro %}{% call(y) m() %}{{ y }}{% endcall %}",
        "{% set ns = namespace(self=1, n=0) %}{% for i in range(3) %}{% set ns.n = ns.n + i %}{% endfor %}"
        "{{ ns.n }}{{ ns.self }}",
        "{% for k, v in {'a': 1, 'b': [2]}.items() if k != 'a' %}{{ k }}{{ v }}{% else %}none{% endfor %}",
        "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}",
        "{% set j = joiner('-') %}{{ j() }}{{ j() }}",
        "{% filter upper %}a{{ 'b' }}{% endfilter %}{% with a = [1, 2] %}{{ a }}{% endwith %}",
        "{% block b %}x{% endblock %}{{ self.b() }}",
        "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}"
        "{% if i == 4 %}{% break %}{% endif %}{% endfor %}",
    ],
)
def test_statements_do_what_jinja2s_do(source):
    plain = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    assert render(source) == plain.from_string(source).render(messages=[{"role": "user", "content": "hi"}])
