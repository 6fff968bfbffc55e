"""Grammars compiled with llguidance, and the automata that follow a generation through them.

Knows no request and no tensor: a mask is bits written to an address.
"""

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

import llguidance

from serving.errors import ModelError, ValidationError
from serving.grammar.json_schema import prepared
from serving.protocol import Grammar, GrammarKind

MAX_SOURCE_CHARACTERS = 256 * 1024
_MOST_ERROR_CHARACTERS: Final = 300
_TRIAL_TOKENS: Final = 16
_DEAD_END: Final = "NoExtension"  # how llguidance says that nothing can follow
_MANY_MATCHERS: Final = 8  # from which on threads are worth waking


class Matcher:
    """One generation's way through a grammar. Not for two threads."""

    def __init__(self, automaton: llguidance.LLMatcher) -> None:
        self._automaton = automaton

    @property
    def error(self) -> str | None:
        """Why the matcher cannot go on, ever, if so: a token that the grammar forbids, a dead end, a bound."""
        return _one_line(self._automaton.get_error()) if self._automaton.is_error() else None

    @property
    def finished(self) -> bool:
        """Whether the text is complete and cannot go on: only end-of-sequence tokens are allowed now."""
        return self._automaton.is_stopped() and not self._automaton.is_error()

    @property
    def accepts(self) -> bool:
        """Whether the text could end here."""
        return self._automaton.is_accepting()

    def advance(self, token_ids: Sequence[int]) -> None:
        """Follow chosen tokens; look at `error` afterwards."""
        for token_id in token_ids:  # one by one: an end-of-sequence token in a list of its own counts as an error
            self._automaton.consume_token(token_id)

    def allowed(self) -> bytes:
        """A bit for every token id, the lowest bit of the first byte first: whether it may come next."""
        return self._automaton.compute_bitmask()

    def fork(self) -> "Matcher":
        """A matcher in the same state that goes its own way; what both learn of the grammar is shared."""
        return Matcher(self._automaton.deep_copy())


class GrammarCompiler:
    """Makes matchers; remembers the grammars that it compiled last. `begin` and `forget` are for one thread.

    Args:
        tokenizer_json: the text of a tokenizer.json.
        vocab_size: ids that the model can choose are below it.
        eos_token_ids: the ids that may end a text.
        remembered: grammars to keep.

    Raises:
        ModelError: no grammar can be followed with this tokenizer.

    Attributes:
        mask_words: 32-bit words of a mask; at least one bit for each id of the model.
    """

    def __init__(
        self, tokenizer_json: str, *, vocab_size: int, eos_token_ids: Iterable[int], remembered: int = 64
    ) -> None:
        eos = sorted(token_id for token_id in eos_token_ids if token_id < vocab_size)
        if not eos:
            raise ModelError("the model has no end-of-sequence token, so that no text could end")
        try:
            self._tokenizer = _tokenizer(tokenizer_json, vocab_size, eos)
        except Exception as error:  # the package promises no narrower class
            raise ModelError(f"grammars cannot be followed with this tokenizer: {_one_line(str(error))}") from error
        self.mask_words = -(-self._tokenizer.vocab_size // 32)
        self._eos_bits = sum(1 << token_id for token_id in set(eos))
        # In llguidance's own units: a step's fuel and items are some 15 ms of a processor at the most, a lexer state is
        # one or two kilobytes; the rest bounds what compiling builds. Verbose errors would quote the generated text.
        self._limits = llguidance.LLParserLimits(
            max_items_in_row=2_000,
            initial_lexer_fuel=1_000_000,
            step_lexer_fuel=200_000,
            step_max_items=50_000,
            max_lexer_states=50_000,
            max_grammar_size=200_000,
            verbose_errors=False,
        )
        self._remembered = remembered
        self._begun: OrderedDict[bytes, Future[Matcher]] = OrderedDict()
        self._thread: ThreadPoolExecutor | None = None
        self._executor: llguidance.LLExecutor | None = None

    def compile(self, grammar: Grammar) -> Matcher:
        """A matcher at the beginning of a text, compiled at once and not remembered.

        Raises:
            ValidationError: the grammar is wrong, too large, or allows no text at all.
        """
        check_size(grammar)
        try:
            text = _in_llguidance(grammar)
        except RecursionError as error:
            raise ValidationError("grammar is not valid: it is nested too deeply") from error
        except ValueError as error:
            raise ValidationError(f"grammar is not valid: {_one_line(str(error))}") from error
        matcher = Matcher(llguidance.LLMatcher(self._tokenizer, text, log_level=0, limits=self._limits))
        if (fault := matcher.error) is not None:
            raise ValidationError(f"grammar is not valid: {fault}")
        self._try_out(matcher.fork())
        return matcher

    def _try_out(self, trial: Matcher) -> None:
        """Follow some text through its first tokens: a grammar that is too complex seldom lasts longer."""
        for place in range(_TRIAL_TOKENS):
            allowed = int.from_bytes(trial.allowed(), "little") & ~self._eos_bits
            if (error := trial.error) is not None:
                fault = "allows no text" if place == 0 and error.startswith(_DEAD_END) else "is too complex"
                raise ValidationError(f"grammar is not valid: it {fault}")
            if not allowed:
                break
            trial.advance(((allowed & -allowed).bit_length() - 1,))

    def begin(self, grammar: Grammar) -> "Future[Matcher]":
        """`compile` in a thread of its own, or what came of it before; only forks of the matcher may advance."""
        name = digest(grammar)
        found = self._begun.get(name)
        if found is None:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
            found = self._begun[name] = self._thread.submit(self.compile, grammar)
            if len(self._begun) > self._remembered:
                self._begun.popitem(last=False)
        self._begun.move_to_end(name)
        return found

    def forget(self, grammar: Grammar) -> None:
        """Compile a grammar anew next time: what forks of one matcher learned together may have met a bound."""
        self._begun.pop(digest(grammar), None)

    def fill(self, matchers: Sequence[Matcher], address: int) -> None:
        """Write every matcher's `allowed` bits, `mask_words` words each, one after another; then look at `error`.

        Args:
            address: of memory for that many words.
        """
        size = self.mask_words * 4
        if len(matchers) < _MANY_MATCHERS:
            for place, matcher in enumerate(matchers):
                matcher._automaton.unsafe_compute_mask_ptr(address + place * size, size)
            return
        if self._executor is None:
            self._executor = llguidance.LLExecutor()
        automata = [(matcher._automaton, place) for place, matcher in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(automata, address, size, len(matchers))


def _tokenizer(tokenizer_json: str, vocab_size: int, eos: list[int]) -> llguidance.LLTokenizer:
    """The model may have rows for more ids than the tokenizer has tokens, or for fewer."""
    try:
        return llguidance.LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=eos)
    except ValueError:
        return llguidance.LLTokenizer(tokenizer_json, eos_token=eos)


def digest(grammar: Grammar) -> bytes:
    """A name for a grammar that no other has."""
    text = f"{grammar.kind}\0{grammar.source}".encode(errors="surrogatepass")
    return hashlib.blake2b(text, digest_size=16).digest()


def check_size(grammar: Grammar) -> None:
    """Raises ValidationError for a grammar that is too long to be looked at."""
    length = len(grammar.source)
    if length > MAX_SOURCE_CHARACTERS:
        raise ValidationError(
            f"grammar is not valid: it must have at most {MAX_SOURCE_CHARACTERS} characters. Given: {length}"
        )


def _in_llguidance(grammar: Grammar) -> str:
    match grammar.kind:
        case GrammarKind.REGEX:
            return llguidance.LLMatcher.grammar_from_regex(grammar.source)
        case GrammarKind.LARK:
            return llguidance.LLMatcher.grammar_from_lark(grammar.source)
        case GrammarKind.JSON_SCHEMA:
            schema = json.loads(grammar.source)
            if schema is False:
                raise ValueError("the schema `false` allows no text")
            if schema is True:
                schema = {}
            if not isinstance(schema, dict):
                raise ValidationError("grammar is not supported")
            return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(prepared(schema)))


def _one_line(message: str) -> str:
    """What llguidance says in a picture of several lines, in one."""
    named = re.search(r"^error: (.*)$", message, re.MULTILINE)
    line = (named[1] if named else message.partition("\n")[0]).strip()
    return line if len(line) <= _MOST_ERROR_CHARACTERS else line[:_MOST_ERROR_CHARACTERS] + "..."
