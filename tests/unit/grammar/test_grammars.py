"""The judge of grammars: verdicts, limits that hold whatever a grammar does, and an untroubled hub."""

import gc
import json
import signal
import threading
import time

import gevent
import psutil
import pytest

from serving.errors import ValidationError
from serving.grammar.grammars import Grammars
from serving.protocol import Grammar, GrammarKind


def chained(length: int, link) -> dict:
    """A schema of references to references."""
    definitions = {f"a{i}": link({"$ref": f"#/$defs/a{i + 1}"}) for i in range(length)}
    return {"$defs": {**definitions, f"a{length}": {"type": "string"}}, "$ref": "#/$defs/a0"}


def nested(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


REFUSED_SCHEMAS = {
    "deep": nested(90),
    "many optional properties": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(3000)}},
    "numbers that take a large automaton": {"type": "integer", "multipleOf": 999_983},
    "many such numbers": {"type": "object", "properties": {f"p{i}": {"multipleOf": 9_973 + 2 * i} for i in range(99)}},
    "a chain of references": chained(3000, lambda schema: schema),
    "a chain of lists": chained(3000, lambda schema: {"type": "array", "items": schema}),
    "references in a circle": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "something elsewhere": {"$ref": "http://127.0.0.1:9/schema"},
    "a combination of combinations": {
        "allOf": [
            {"anyOf": [{"type": "object", "properties": {f"p{i}_{j}": {"const": j}}} for j in range(6)]}
            for i in range(9)
        ]
    },
    "contradictory patterns": {"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{9 + i}}}"} for i in range(10)]},
}
REFUSED_REGEXES = {
    "brackets": "(" * 100_000 + "a" + ")" * 100_000,
    "a million letters": "a{1000000}",
    "a long text": "ab" * 200_000,
    "nothing": r"[^\s\S]",
}
TAKEN = {
    "a large enumeration": Grammar(GrammarKind.JSON_SCHEMA, json.dumps({"enum": [f"v{i}" for i in range(15_000)]})),
    "endless recursion": Grammar(
        GrammarKind.JSON_SCHEMA, json.dumps({"type": "object", "properties": {"next": {"$ref": "#"}}})
    ),
    "counts of counts": Grammar(GrammarKind.REGEX, "(a{1,1000}){1,1000}"),
    "an exponential automaton": Grammar(GrammarKind.REGEX, "(a|b)*a(a|b){20}"),
    "another": Grammar(GrammarKind.REGEX, "(.*a.{18}){3}"),
    "ambiguity": Grammar(GrammarKind.REGEX, "(a|aa)+"),
    "letters of all scripts": Grammar(GrammarKind.REGEX, r"(\p{L}|\d){5000}"),
}
REFUSED = {
    **{name: Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema)) for name, schema in REFUSED_SCHEMAS.items()},
    **{name: Grammar(GrammarKind.REGEX, source) for name, source in REFUSED_REGEXES.items()},
}


@pytest.fixture(scope="module", autouse=True)
def started(grammars):
    grammars.check(Grammar(GrammarKind.REGEX, "warm"))


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_grammar_is_refused_within_a_second(grammars, name):
    grammars.check(Grammar(GrammarKind.REGEX, f"until the next process is ready for {name}"))
    begun = time.monotonic()
    with pytest.raises(ValidationError, match=r"^Input validation error: grammar is not valid: "):
        grammars.check(REFUSED[name])

    assert time.monotonic() - begun < 1.0


@pytest.mark.parametrize("name", TAKEN)
def test_a_large_but_bounded_grammar_is_taken_within_a_second(grammars, name):
    begun = time.monotonic()
    grammars.check(TAKEN[name])

    assert time.monotonic() - begun < 1.0


def test_a_good_grammar_passes_after_a_hostile_one(grammars):
    with pytest.raises(ValidationError):
        grammars.check(Grammar(GrammarKind.JSON_SCHEMA, '{"type": "integer", "multipleOf": 999979}'))

    grammars.check(Grammar(GrammarKind.REGEX, "good after evil"))


def test_verdicts_are_remembered(tokenizer):
    judge = Grammars(tokenizer.to_json(), vocab_size=258, eos_token_ids=[0])
    good = Grammar(GrammarKind.REGEX, "good")
    crash, wrong = REFUSED["a chain of references"], Grammar(GrammarKind.REGEX, "([")
    judge.check(good)
    for grammar in (wrong, crash):
        with pytest.raises(ValidationError):
            judge.check(grammar)
    judge.close()  # no process is left to ask

    judge.check(good)
    with pytest.raises(ValidationError, match="grammar is not valid: unclosed character class"):
        judge.check(wrong)
    with pytest.raises(ValidationError, match="grammar is not valid: it is too complex"):
        judge.check(crash)


@pytest.mark.parametrize("name", ["numbers that take a large automaton", "many such numbers"])
def test_the_hub_goes_on_while_a_hostile_grammar_is_judged(tokenizer, name):
    """The check runs in a thread, as `Bridge.offload` does it; what would hold the interpreter would hold the hub."""
    judge = Grammars(tokenizer.to_json(), vocab_size=258, eos_token_ids=[0])
    judge.check(Grammar(GrammarKind.REGEX, "warm"))
    ticks = 0

    def judged() -> None:
        with pytest.raises(ValidationError):
            judge.check(REFUSED[name])

    checking = gevent.get_hub().threadpool.spawn(judged)
    while not checking.ready():
        gevent.sleep(0.002)
        ticks += 1
    checking.get()
    judge.close()

    assert ticks > 20


def test_a_process_that_others_killed_refuses_no_grammar(tokenizer):
    judge = Grammars(tokenizer.to_json(), vocab_size=258, eos_token_ids=[0])
    judge.check(Grammar(GrammarKind.REGEX, "before"))
    judge._idle[0]._process.kill()
    judge._idle[0]._process.wait()

    judge.check(Grammar(GrammarKind.REGEX, "after"))
    judge.close()


@pytest.mark.parametrize("killer", [pytest.param(signal.SIGKILL, id="while it judges"), None])
def test_what_the_grammar_did_not_cause_is_not_remembered(tokenizer, killer):
    judge = Grammars(tokenizer.to_json(), vocab_size=258, eos_token_ids=[0])
    innocent = Grammar(GrammarKind.REGEX, "innocent")
    if killer is None:  # it ends before it is ready: it finds no tokenizer
        judge._arguments.insert(0, "no number")
    else:
        judge.warm()
        judge._idle[0].alive = lambda: True
        judge._idle[0]._process.send_signal(killer)
        judge._idle[0]._process.wait()
    with pytest.raises(ValidationError, match="takes too long to compile"):
        judge.check(innocent)
    if killer is None:
        del judge._arguments[0]
        judge._idle.pop().end()

    judge.check(innocent)
    judge.close()


def test_many_threads_may_ask_at_once(grammars):
    failures = []

    def ask(number: int) -> None:
        for i in range(5):
            grammars.check(Grammar(GrammarKind.REGEX, f"thread {number} grammar {i}"))
            try:
                grammars.check(Grammar(GrammarKind.REGEX, f"({number}{i}["))
            except ValidationError:
                continue
            failures.append((number, i))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failures == []


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


def test_closing_ends_every_process(tokenizer):
    before = children()
    judge = Grammars(tokenizer.to_json(), vocab_size=258, eos_token_ids=[0])
    judge.check(Grammar(GrammarKind.REGEX, "a"))
    with pytest.raises(ValidationError):
        judge.check(REFUSED["a chain of references"])
    own = children() - before
    assert own
    judge.close()
    judge.close()

    assert not own & children()


def test_a_judge_that_nobody_holds_leaves_no_process_behind(tokenizer):
    before = children()
    judge = Grammars(tokenizer.to_json(), vocab_size=258, eos_token_ids=[0])
    judge.check(Grammar(GrammarKind.REGEX, "a"))
    own = children() - before
    assert own
    del judge
    gc.collect()

    assert not own & children()


def test_a_tokenizer_that_cannot_be_used_leaves_grammars_unsupported():
    judge = Grammars("{}", vocab_size=258, eos_token_ids=[0])
    with pytest.raises(ValidationError, match=r"^Input validation error: grammar is not supported$"):
        judge.check(Grammar(GrammarKind.REGEX, "a"))
    judge.close()
