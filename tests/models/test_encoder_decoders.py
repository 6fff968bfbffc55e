"""Every encoder-decoder against transformers: texts of many lengths, chunks, decode, shared blocks, ranks."""

import json
import random

import pytest
import torch
from models.cases import ENCODER_DECODERS, EVERY_ENCODER_DECODER, FALLBACK_ENCODER_DECODERS, randomized
from models.hand_fed import BLOCK, CPU, Ours, row, worst_difference
from models.rank_threads import on_ranks
from safetensors.torch import load_file, save_file

from serving.runner.dummy import random_checkpoint

# Without the first ids, one of which is padding: some classes give it no position.
TEXT = [3 + (5 * i + 2) % 128 for i in range(37)]
ANSWER = [0, *(3 + (7 * i + 3) % 128 for i in range(29))]


@pytest.fixture(params=EVERY_ENCODER_DECODER)
def pair(request, tmp_path):
    theirs = randomized(EVERY_ENCODER_DECODER[request.param])
    theirs.save_pretrained(tmp_path)
    return theirs, Ours(tmp_path)


@torch.inference_mode()
def expected(theirs, text, answer):
    return theirs(input_ids=torch.tensor([text]), decoder_input_ids=torch.tensor([answer])).logits[0]


def test_texts_of_many_lengths_in_mixed_batches_equal_transformers(pair):
    theirs, ours = pair
    rng = random.Random(3)
    text_lengths, answer_lengths = [1, 50, 3, 17, 16, 33, 4, 25], [30, 6, 1, 40, 17, 12, 3, 26]
    texts = [[rng.randrange(3, 131) for _ in range(n)] for n in text_lengths]
    answers = [[0, *(rng.randrange(3, 131) for _ in range(n))] for n in answer_lengths]
    want = [expected(theirs, *both) for both in zip(texts, answers, strict=True)]
    free = iter(rng.sample(range(1, 128), 120))
    tables = [[next(free) for _ in range(-(-len(ids) // BLOCK))] for ids in answers]
    computed, begun = [0] * len(texts), set()
    while any(done < len(ids) for done, ids in zip(computed, answers, strict=True)):
        rows, targets = [], []
        for i, ids in enumerate(answers):
            # Single tokens mostly, and chunks as after a preemption; some rows sit a step out, or begin later.
            count = min(rng.choice([1, 1, 1, 7, 19]), len(ids) - computed[i])
            if count and rng.random() < 0.7:
                rows.append(row(i, ids, computed[i], computed[i] + count, tables[i]))
                targets.append(want[i][computed[i] : computed[i] + count])
                computed[i] += count
        started = {row.sequence_id for row in rows} - begun
        begun |= started
        ours.read({i: texts[i] for i in started})
        for got, target in zip(ours.logits(rows) if rows else [], targets, strict=True):
            assert worst_difference(got, target) < 1e-5


def test_rows_of_one_text_that_share_blocks_equal_transformers(pair):
    theirs, ours = pair
    prefix = ANSWER[: 4 * BLOCK]
    first, second = [*prefix, 3, 5], [*prefix, 90, 91, 92, 93, 94]
    ours.read({0: TEXT, 1: TEXT})
    ours.logits([row(0, first, 0, len(first), [9, 8, 7, 6, 5])])
    (got,) = ours.logits([row(1, second, len(prefix), len(second), [9, 8, 7, 6, 20, 21])])
    assert worst_difference(got, expected(theirs, TEXT, second)[len(prefix) :]) < 1e-5


def test_a_slot_that_another_row_had_before_shows_nothing_of_it(pair):
    theirs, ours = pair
    ours.read({i: [i + 1] * 50 for i in range(8)})
    ours.texts.finish(5)
    ours.read({9: TEXT[:6]})
    (got,) = ours.logits([row(9, ANSWER, 0, 30, list(range(1, 9)))])
    assert worst_difference(got, expected(theirs, TEXT[:6], ANSWER)) < 1e-5


def test_every_tensor_of_the_checkpoint_is_used(pair):
    _, ours = pair
    assert ours.weights.unread() == []


def test_bfloat16_stays_near_float32(pair, tmp_path):
    theirs, _ = pair
    ours = Ours(tmp_path, torch.bfloat16)
    ours.read({0: TEXT})
    (got,) = ours.logits([row(0, ANSWER, 0, 30, list(range(1, 9)))])
    reference = expected(theirs, TEXT, ANSWER)
    rounding = (expected(theirs.bfloat16(), TEXT, ANSWER).float() - reference).abs().mean()
    assert (got - reference).abs().mean() < 1.5 * rounding


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", ENCODER_DECODERS)
def test_ranks_equal_transformers(case, size, tmp_path):
    theirs = randomized(ENCODER_DECODERS[case])
    theirs.save_pretrained(tmp_path)

    def chunk_then_tokens(ranks):
        ours = Ours(tmp_path, ranks=ranks)
        ours.read({0: TEXT})
        spans = [(0, 27), (27, 28), (28, 29), (29, 30)]
        return torch.cat([ours.logits([row(0, ANSWER, *span, list(range(1, 9)))])[0] for span in spans])

    assert worst_difference(on_ranks(size, chunk_then_tokens), expected(theirs, TEXT, ANSWER)) < 1e-5


def test_wide_groups_are_split(tmp_path, monkeypatch):
    monkeypatch.setattr("serving.runner.encoder.MAX_GROUP_TOKENS", 40)
    theirs = randomized(ENCODER_DECODERS["t5"])
    theirs.save_pretrained(tmp_path)
    ours = Ours(tmp_path)
    texts = [TEXT[: 5 + 6 * i] for i in range(5)]
    ours.read(dict(enumerate(texts)))
    got = ours.logits([row(i, ANSWER, 0, 1, [i + 1]) for i in range(5)])
    for text, logits in zip(texts, got, strict=True):
        assert worst_difference(logits, expected(theirs, text, ANSWER[:1])) < 1e-5


@pytest.mark.parametrize("case", EVERY_ENCODER_DECODER)
def test_random_weights_have_the_names_of_files(case, tmp_path):
    EVERY_ENCODER_DECODER[case].save_pretrained(tmp_path)
    ours = Ours(tmp_path, weights=random_checkpoint(tmp_path, CPU, torch.float32))
    ours.read({0: [1, 2, 3]})
    (logits,) = ours.logits([row(0, [0, 2, 3], 0, 3, [1])])
    assert logits.shape == (3, 131)
    assert logits.isfinite().all()


@pytest.mark.parametrize("case", FALLBACK_ENCODER_DECODERS)
def test_what_a_decoder_sees_of_a_text_is_computed_once(case, tmp_path):
    randomized(FALLBACK_ENCODER_DECODERS[case]).save_pretrained(tmp_path)
    ours, computed = Ours(tmp_path), []
    for name, module in ours.model.model.named_modules():
        if name.endswith(("encoder_attn.k_proj", "encoder_attn.v_proj")):
            module.register_forward_hook(lambda *_, name=name: computed.append(name))
    ours.read({0: TEXT})
    assert len(set(computed)) == len(computed) == 4
    ours.logits([row(0, ANSWER, 0, 9, [1, 2, 3])])
    ours.logits([row(0, ANSWER, 9, 10, [1, 2, 3])])
    assert len(computed) == 4


@pytest.mark.parametrize("name", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"])
def test_the_embedding_is_found_under_each_of_its_names(name, tmp_path):
    theirs = randomized(ENCODER_DECODERS["t5"])
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name] = tensors.pop("shared.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    ours = Ours(tmp_path)
    ours.read({0: TEXT})
    (got,) = ours.logits([row(0, ANSWER, 0, 30, list(range(1, 9)))])
    assert worst_difference(got, expected(theirs, TEXT, ANSWER)) < 1e-5


def test_files_of_before_say_by_the_head_whether_outputs_are_scaled(tmp_path):
    theirs = randomized(ENCODER_DECODERS["t5-gated-untied"])
    theirs.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    assert said.pop("scale_decoder_outputs") is False
    (tmp_path / "config.json").write_text(json.dumps({**said, "tie_word_embeddings": False}))
    ours = Ours(tmp_path)
    ours.read({0: TEXT})
    (got,) = ours.logits([row(0, ANSWER, 0, 30, list(range(1, 9)))])
    assert worst_difference(got, expected(theirs, TEXT, ANSWER)) < 1e-5


def test_a_text_that_no_slot_holds_is_refused(tmp_path):
    randomized(ENCODER_DECODERS["t5"]).save_pretrained(tmp_path)
    ours = Ours(tmp_path)
    with pytest.raises(ValueError, match="51 tokens"):
        ours.read({0: [1] * 51})
