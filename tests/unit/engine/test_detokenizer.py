import pytest
import tokenizers
from fakes import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from serving.engine.detokenizer import Detokenizer
from serving.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Le cœur déçu mais l'âme plutôt naïve, Louÿs rêva de crapaüter en canoë.",
    "机器学习模型生成文本。机器学习模型生成文本。",
    "def add(a, b):\n    return a + b\n",
    "smile 😀 wave 👋🏽 family 👨‍👩‍👧",
]
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def byte_level():
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    return Tokenizer(backend, {})


def sentencepiece_like():
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=120, show_progress=False, limit_alphabet=40)
    trained.train_from_iterator(CORPUS[:2] + CORPUS[3:4], trainer)
    pieces = [piece for piece, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])]
    vocab = {"<unk>": 0, "<s>": 1, **{f"<0x{byte:02X}>": 2 + byte for byte in range(256)}}
    for piece in pieces:
        vocab.setdefault(piece, len(vocab))
    merges = [
        (left, right)
        for left in pieces
        for right in pieces
        if left + right in vocab and trained.encode(left + right).ids
    ]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = trained.normalizer
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "<unk>"])
    return Tokenizer(backend, {})


def metaspace():
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return Tokenizer(backend, {})


TOKENIZERS = {"byte-level": byte_level(), "sentencepiece-like": sentencepiece_like(), "metaspace": metaspace()}
both = pytest.mark.parametrize("name", ["byte-level", "sentencepiece-like"])
every = pytest.mark.parametrize("name", list(TOKENIZERS))


def push_all(tokenizer, ids, prompt=()):
    detokenizer = Detokenizer(tokenizer, list(prompt))
    return [detokenizer.push(token_id) for token_id in ids], detokenizer


@both
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters=REPLACEMENT), max_size=60))
def test_pieces_add_up_to_the_decoded_whole(name, text):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    pieces, detokenizer = push_all(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert detokenizer.flush() == ""


@every
@pytest.mark.parametrize("text", CORPUS)
def test_a_long_text_comes_out_whole(name, text):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(" ".join([text] * 20), add_special_tokens=False)
    pieces, _ = push_all(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert REPLACEMENT not in "".join(pieces)


@both
@given(words=st.lists(st.sampled_from([*"abé😀机 ", "the ", "文本"]), min_size=2, max_size=30), data=st.data())
def test_a_prompt_gives_context_and_no_text(name, words, data):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode("".join(words))
    texts = [tokenizer.decode(ids[:cut]) for cut in range(len(ids) + 1)]
    whole_at = [cut for cut, text in enumerate(texts) if cut and not text.endswith(REPLACEMENT)]
    if not whole_at:
        return
    cut = data.draw(st.sampled_from(whole_at))
    pieces, _ = push_all(tokenizer, ids[cut:], prompt=ids[:cut])
    assert texts[cut] + "".join(pieces) == texts[-1]


@given(st.lists(st.integers(2, 257), max_size=40))
def test_any_bytes_lose_no_whole_character(ids):
    tokenizer = byte_tokenizer()
    pieces, detokenizer = push_all(tokenizer, ids)
    pieces.append(detokenizer.flush())
    assert "".join(pieces).replace(REPLACEMENT, "") == tokenizer.decode(ids).replace(REPLACEMENT, "")


@both
@given(data=st.data())
def test_any_ids_never_raise(name, data):
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(2, tokenizer.vocab_size - 1), max_size=60))
    pieces, detokenizer = push_all(tokenizer, ids, prompt=ids[:3])
    assert all(isinstance(piece, str) for piece in [*pieces, detokenizer.flush()])


def test_a_character_comes_with_the_token_that_completes_it():
    tokenizer = byte_tokenizer()
    pieces, _ = push_all(tokenizer, tokenizer.encode("a😀b"))
    assert pieces == ["a", "", "", "", "😀", "b"]


def test_tokens_that_straddle_characters_lose_nothing():
    tokenizer = TOKENIZERS["byte-level"]
    raw = "机器学习模型".encode()
    byte_ids = [tokenizer.token_id(sign) for sign in byte_level_signs(raw)]
    pieces, _ = push_all(tokenizer, byte_ids)
    assert "".join(pieces) == "机器学习模型"


def byte_level_signs(raw):
    """The signs that byte-level tokenizers write bytes with."""
    alphabet = {}
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255:
            alphabet[byte] = chr(byte)
    missing = [byte for byte in range(256) if byte not in alphabet]
    alphabet.update({byte: chr(256 + at) for at, byte in enumerate(missing)})
    return [alphabet[byte] for byte in raw]


def test_an_incomplete_character_at_the_end_is_left_out_but_not_what_stands_before():
    tokenizer = byte_tokenizer()
    pieces, detokenizer = push_all(tokenizer, tokenizer.encode("hey 😀")[:-1])
    assert "".join(pieces) + detokenizer.flush() == "hey "
    assert detokenizer.flush() == ""


def test_a_generated_replacement_character_is_text():
    tokenizer = byte_tokenizer()
    pieces, _ = push_all(tokenizer, tokenizer.encode("a\N{REPLACEMENT CHARACTER}b"))
    assert "".join(pieces) == "a\N{REPLACEMENT CHARACTER}b"


def test_bytes_that_are_never_a_character_do_not_pile_up():
    tokenizer = byte_tokenizer()
    broken = tokenizer.encode("é")[1]
    pieces, detokenizer = push_all(tokenizer, [broken] * 500)
    assert len("".join(pieces)) > 490
    assert len(detokenizer._window) < 10
    after = [detokenizer.push(token_id) for token_id in tokenizer.encode("机ok")]
    assert "".join(after).lstrip(REPLACEMENT) == "机ok"


@every
def test_the_window_stays_short(name):
    tokenizer = TOKENIZERS[name]
    detokenizer = Detokenizer(tokenizer, [])
    longest = 0
    for token_id in tokenizer.encode(" ".join(CORPUS * 20)):
        detokenizer.push(token_id)
        longest = max(longest, len(detokenizer._window))
    assert longest <= 16


def test_a_leading_space_is_kept_after_a_prompt():
    tokenizer = TOKENIZERS["sentencepiece-like"]
    prompt, more = tokenizer.encode("The quick"), tokenizer.encode("brown")
    assert "".join(push_all(tokenizer, more, prompt)[0]) == " brown"
    assert "".join(push_all(tokenizer, more)[0]) == "brown"


def test_a_special_token_begins_a_new_text():
    tokenizer = TOKENIZERS["sentencepiece-like"]
    prompt = [*tokenizer.encode("The quick"), tokenizer.token_id("<s>")]
    assert "".join(push_all(tokenizer, tokenizer.encode("brown"), prompt)[0]) == "brown"


def test_a_prompt_cut_inside_a_character_does_not_break_what_follows():
    tokenizer = TOKENIZERS["sentencepiece-like"]
    raw = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in "机器学习".encode()]
    assert "".join(push_all(tokenizer, raw[6:], prompt=raw[:6])[0]) == "学习"
