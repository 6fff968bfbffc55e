"""Grammars over one token a byte: ids 0 and 1 are `</s>` (end of sequence) and `<s>`, then the bytes."""

import json

import pytest
from fakes import byte_tokenizer

from serving.grammar.compiler import GrammarCompiler
from serving.grammar.grammars import Grammars
from serving.protocol import Grammar, GrammarKind

VOCAB_SIZE = 260  # two ids more than the tokenizer has tokens
EOS = 0


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="session")
def compiler(tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer.to_json(), vocab_size=VOCAB_SIZE, eos_token_ids=[EOS])


@pytest.fixture(scope="module")
def grammars(tokenizer):
    judge = Grammars(tokenizer.to_json(), vocab_size=VOCAB_SIZE, eos_token_ids=[EOS])
    yield judge
    judge.close()


@pytest.fixture(scope="session")
def takes(tokenizer, compiler):
    """Whether a text is whole under a grammar."""

    def take(grammar: Grammar, text: str) -> bool:
        matcher = compiler.compile(grammar)
        matcher.advance(tokenizer.encode(text))
        return matcher.error is None and matcher.accepts

    return take


@pytest.fixture(scope="session")
def schema():
    def make(value: object) -> Grammar:
        return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(value))

    return make


@pytest.fixture(scope="session")
def regex():
    def make(source: str) -> Grammar:
        return Grammar(GrammarKind.REGEX, source)

    return make
