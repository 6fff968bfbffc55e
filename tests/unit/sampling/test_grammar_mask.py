"""Grammars in the sampler: what is chosen is allowed, everything else about a choice is as without one."""

import json
import random
from concurrent.futures import Future

import jsonschema
import pytest
import torch
from fakes import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import GenerationError
from serving.grammar.compiler import GrammarCompiler
from serving.plan import Choice, NewRow, Row
from serving.protocol import Grammar, GrammarKind, SamplingParams
from serving.sampling import candidates
from serving.sampling.grammar_mask import GrammarMasks
from serving.sampling.sampler import Sampler

TOKENIZER = byte_tokenizer()
VOCAB = 270  # more rows of the model than tokens
EOS = 0
PROMPT = [5, 6, 7]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU found")],
    ),
]
SAMPLED = SamplingParams(do_sample=True, seed=3, temperature=1.7, top_k=9, top_p=0.95, repetition_penalty=1.1)


@pytest.fixture(scope="module")
def compiler():
    return GrammarCompiler(TOKENIZER.to_json(), vocab_size=VOCAB, eos_token_ids=[EOS])


def regex(source: str) -> Grammar:
    return Grammar(GrammarKind.REGEX, source)


def with_grammar(grammar: Grammar, **params) -> SamplingParams:
    return SamplingParams(grammar=grammar, **params)


def new_row(sequence_id: int, params: SamplingParams, written: list[int] | None = None) -> NewRow:
    return NewRow(
        sequence_id=sequence_id,
        token_ids=[*PROMPT, *(written or [])],
        prompt_length=len(PROMPT),
        sampling=params,
    )


def row(sequence_id: int, length: int = len(PROMPT)) -> Row:
    return Row(sequence_id=sequence_id, token_ids=[0], position=length - 1, block_table=[], sample=True)


def make(compiler: GrammarCompiler | None, *rows: NewRow, device: str = "cpu") -> Sampler:
    sampler = Sampler(VOCAB, torch.device(device), compiler)
    for new in rows:
        if compiler is not None and new.sampling.grammar is not None:
            compiler.begin(new.sampling.grammar).exception(5)  # so that no choice waits
        sampler.start(new)
    return sampler


def random_logits(rows: int, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    return (torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 4).to(device)


def written(sampler: Sampler, sequence_id: int, steps: int, *, seed: int = 0, device: str = "cpu") -> list[int]:
    """What a row comes to under random logits, its end-of-sequence token left out."""
    found: list[int] = []
    for step in range(steps):
        [choice] = sampler.choose(
            random_logits(1, seed * 1000 + step, device), [row(sequence_id, len(PROMPT) + len(found))]
        )
        assert isinstance(choice, Choice), choice
        if choice.token_id == EOS:
            break
        found.append(choice.token_id)
    return found


@pytest.mark.parametrize("device", DEVICES)
def test_a_mask_leaves_what_the_grammar_allows_and_nothing_else(compiler, device):
    masks = GrammarMasks(compiler, torch.device(device))
    matchers = [compiler.compile(regex(source)) for source in ("[a-c]", "", "[0-9]", "x", "y", "z")]
    logits = random_logits(len(matchers), device=device)
    before = logits.clone()

    masks.apply(logits, masks.bits(matchers))

    for line, old, text in zip(logits, before, ("abc", None, "0123456789", "x", "y", "z"), strict=True):
        allowed = {EOS} if text is None else set(TOKENIZER.encode(text))
        assert set(line.isfinite().nonzero().flatten().tolist()) == allowed
        assert torch.equal(line[list(allowed)], old[list(allowed)])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("params", [SamplingParams(), SAMPLED], ids=["greedy", "sampled"])
def test_every_choice_is_allowed_until_the_end_is_forced(compiler, device, params):
    grammar = regex(r"\d{3}-[a-f]{2}")
    sampler = make(compiler, new_row(1, SamplingParams(**{**asdict(params), "grammar": grammar})), device=device)

    text = TOKENIZER.decode(written(sampler, 1, 20, device=device))

    assert compiler_takes(compiler, grammar, text)
    assert len(text) == 6


def asdict(params: SamplingParams) -> dict:
    return {name: getattr(params, name) for name in params.__struct_fields__}


def compiler_takes(compiler: GrammarCompiler, grammar: Grammar, text: str) -> bool:
    matcher = compiler.compile(grammar)
    matcher.advance(TOKENIZER.encode(text))
    return matcher.accepts and matcher.error is None


def test_a_greedy_choice_is_the_best_that_is_allowed_and_its_probability_is_among_those(compiler):
    sampler = make(compiler, new_row(1, with_grammar(regex("[a-c]"), top_n_tokens=5)))
    logits = random_logits(1)
    allowed = sorted(TOKENIZER.encode("abc"), key=lambda token_id: -float(logits[0, token_id]))

    [choice] = sampler.choose(logits, [row(1)])

    assert choice.token_id == allowed[0]
    assert choice.logprob == pytest.approx(float(logits[0, allowed].log_softmax(-1)[0]), abs=1e-5)
    assert [token_id for token_id, _ in choice.top] == allowed


def test_logits_stay_as_they_are(compiler):
    sampler = make(compiler, new_row(1, with_grammar(regex("[a-c]"))), new_row(2, SamplingParams()))
    logits = random_logits(2)
    before = logits.clone()

    sampler.choose(logits, [row(1), row(2)])

    assert torch.equal(logits, before)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_with_and_without_grammars_do_not_disturb_each_other(compiler, device):
    asked = [
        SamplingParams(),
        with_grammar(regex("[a-m]+")),
        SAMPLED,
        with_grammar(regex("[n-z]+"), do_sample=True, seed=8),
        with_grammar(regex("[a-m]+")),
        with_grammar(regex("[0-9]+"), repetition_penalty=1.3),
    ]
    logits = random_logits(len(asked), device=device)
    together = make(compiler, *(new_row(i, params) for i, params in enumerate(asked)), device=device)
    alone = [
        make(compiler, new_row(i, params), device=device).choose(logits[i : i + 1], [row(i)])[0]
        for i, params in enumerate(asked)
    ]

    found = together.choose(logits, [row(i) for i in range(len(asked))])

    assert [choice.token_id for choice in found] == [choice.token_id for choice in alone]
    assert [choice.logprob for choice in found] == pytest.approx([choice.logprob for choice in alone], abs=1e-5)


def test_a_restarted_row_goes_on_where_it_stood(compiler):
    params = with_grammar(regex("(ab|cd){8}"))
    whole = written(make(compiler, new_row(1, params)), 1, 20)
    moved = make(compiler, new_row(1, params, whole[:5]))

    [choice] = moved.choose(random_logits(1, 5), [row(1, len(PROMPT) + 5)])

    assert choice.token_id == whole[5]


def test_a_row_that_no_grammar_leads_to_fails_alone(compiler):
    broken = with_grammar(regex("abc"))
    sampler = make(
        compiler,
        new_row(1, broken, TOKENIZER.encode("x")),
        new_row(2, SamplingParams()),
        new_row(3, with_grammar(regex("[a-c]"))),
    )
    found = sampler.choose(random_logits(3), [row(1), row(2), row(3)])

    assert isinstance(found[0], GenerationError)
    assert "the grammar cannot be followed" in found[0].detail
    assert found[1].token_id == int(random_logits(3)[1].argmax())
    assert TOKENIZER.decode([found[2].token_id]) in "abc"


def test_a_row_whose_logits_rule_out_all_that_is_allowed_fails(compiler):
    sampler = make(compiler, new_row(1, with_grammar(regex("[a-c]"))))

    [found] = sampler.choose(torch.full((1, VOCAB), float("nan")), [row(1)])

    assert isinstance(found, GenerationError)


def test_a_grammar_that_the_device_refuses_is_the_rows_own_error(compiler):
    sampler = make(compiler, new_row(1, with_grammar(regex("(["))), new_row(2, SamplingParams()))

    first, second = sampler.choose(random_logits(2), [row(1), row(2)])

    assert isinstance(first, GenerationError)
    assert first.detail == "grammar is not valid: unclosed character class"
    assert isinstance(second, Choice)


def test_without_a_compiler_a_row_with_a_grammar_fails():
    sampler = make(None, new_row(1, with_grammar(regex("a"))), new_row(2, SamplingParams()))

    first, second = sampler.choose(random_logits(2), [row(1), row(2)])

    assert isinstance(first, GenerationError)
    assert isinstance(second, Choice)


def test_a_row_waits_for_its_grammar_while_others_go_on(compiler):
    begun: Future = Future()

    class Slow:
        mask_words = compiler.mask_words
        fill = staticmethod(compiler.fill)

        def begin(self, grammar):
            return begun

    sampler = Sampler(VOCAB, torch.device("cpu"), Slow())
    sampler.start(new_row(1, with_grammar(regex("[a-c]"))))
    sampler.start(new_row(2, SamplingParams()))
    logits = random_logits(2)

    first, second = sampler.choose(logits, [row(1), row(2)])
    assert first is None
    assert second.token_id == int(logits[1].argmax())

    begun.set_result(compiler.compile(regex("[a-c]")))
    [first] = sampler.choose(logits[:1], [row(1)])
    assert TOKENIZER.decode([first.token_id]) in "abc"


names = st.sampled_from(["a", "b", "name", "ä", "x y"])
schemas = st.recursive(
    st.one_of(
        st.just({"type": "null"}),
        st.just({"type": "boolean"}),
        st.builds(
            lambda low, span: {"type": "integer", "minimum": low, "maximum": low + span},
            st.integers(-50, 50),
            st.integers(0, 500),
        ),
        st.builds(
            lambda low, span: {"type": "string", "minLength": low, "maxLength": low + span},
            st.integers(0, 3),
            st.integers(0, 5),
        ),
        st.builds(lambda values: {"enum": values}, st.lists(st.sampled_from(["x", "yy", 1, None, 2.5]), min_size=1)),
        st.just({"const": {"k": [1, "z"]}}),
        st.just({"type": "string", "pattern": "^[ab]{1,4}$"}),
    ),
    lambda inner: st.one_of(
        st.builds(
            lambda items, least, span: {"type": "array", "items": items, "minItems": least, "maxItems": least + span},
            inner,
            st.integers(0, 2),
            st.integers(0, 2),
        ),
        st.builds(lambda choices: {"anyOf": choices}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(
            lambda members, dice: {
                "type": "object",
                "properties": members,
                "required": [name for name in members if random.Random(dice).random() < 0.5],
            },
            st.dictionaries(names, inner, max_size=3),
            st.integers(0, 100),
        ),
    ),
    max_leaves=6,
)


@given(schema=schemas, seed=st.integers(0, 10_000), do_sample=st.booleans())
@settings(max_examples=150, deadline=None)
def test_what_is_written_is_valid_under_any_schema(compiler, schema, seed, do_sample):
    grammar = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema))
    sampler = make(compiler, new_row(1, with_grammar(grammar, do_sample=do_sample, seed=seed)))

    text = TOKENIZER.decode(written(sampler, 1, 3000, seed=seed))

    jsonschema.validate(json.loads(text), schema)


def test_filters_look_no_further_than_what_a_mask_leaves(compiler):
    """The candidates are whole as soon as they reach what is forbidden, whatever the filters ask for."""
    allowed = TOKENIZER.encode("abc")
    logits = torch.full((1, VOCAB), -torch.inf)
    logits[0, allowed] = torch.tensor([1.0, 3.0, 2.0])

    def column(value, dtype=torch.float32):
        return torch.tensor([[value]], dtype=dtype)

    kept, enough = candidates.narrow(
        candidates.largest(logits, 8),
        candidates.weight(logits),
        column(50, torch.int64),
        column(0.999),
        column(0.0),
    )

    assert bool(enough[0])
    assert kept.ids[0, :3].tolist() == [allowed[1], allowed[2], allowed[0]]
