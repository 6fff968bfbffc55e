import json
import threading
import time

import pytest
import tokenizers
from fakes import byte_tokenizer
from tokenizers import decoders, models, pre_tokenizers, processors

from serving.errors import ModelError
from serving.tokenizer import Tokenizer


def backend(*added):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: token_id for token_id, token in enumerate(["<s>", "</s>", "<|user|>", *alphabet])}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(added))
    return made


def save(directory, made, config=None, special_tokens_map=None):
    made.save(str(directory / "tokenizer.json"))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if special_tokens_map is not None:
        (directory / "special_tokens_map.json").write_text(json.dumps(special_tokens_map))
    return directory


def test_special_tokens_may_be_strings_or_objects(tmp_path):
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False, "__type": "AddedToken"}}
    tokenizer = Tokenizer.load(save(tmp_path, backend(), config))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_token_id) == ("<s>", "</s>", 1)
    assert tokenizer.special_ids == {0, 1}
    assert tokenizer.config["bos_token"] == "<s>"


def test_special_tokens_come_from_the_older_file_too(tmp_path):
    special_tokens_map = {"eos_token": "</s>", "additional_special_tokens": [{"content": "<|user|>"}]}
    tokenizer = Tokenizer.load(save(tmp_path, backend(), {}, special_tokens_map))
    assert tokenizer.eos_token_id == 1
    assert tokenizer.special_ids == {1, 2}


def test_the_newer_file_wins_over_the_older(tmp_path):
    tokenizer = Tokenizer.load(save(tmp_path, backend(), {"eos_token": "<s>"}, {"eos_token": "</s>"}))
    assert tokenizer.eos_token_id == 0


def test_added_tokens_decoder_says_what_is_special(tmp_path):
    config = {"added_tokens_decoder": {"2": {"content": "<|user|>", "special": True}, "0": {"content": "<s>"}}}
    assert Tokenizer.load(save(tmp_path, backend(), config)).special_ids == {2}


def test_tokenizer_json_alone_is_enough(tmp_path):
    tokenizer = Tokenizer.load(save(tmp_path, backend("</s>")))
    assert tokenizer.special_ids == {1}
    assert tokenizer.eos_token is None
    assert tokenizer.eos_token_id is None
    assert tokenizer.config == {}


def test_a_special_token_outside_the_vocabulary_gets_no_new_id(tmp_path):
    tokenizer = Tokenizer.load(save(tmp_path, backend(), {"pad_token": "<pad>", "eos_token": "</s>"}))
    assert tokenizer.vocab_size == 3 + 256
    assert tokenizer.special_ids == {1}


def test_vocab_size_covers_added_tokens(tmp_path):
    assert Tokenizer.load(save(tmp_path, backend("<|new|>"))).vocab_size == 3 + 256 + 1


@pytest.mark.parametrize(
    ("said", "believed"),
    [(2048, 2048), (2048.0, 2048), (int(1e30), None), (1e30, None), (None, None), ("long", None), (True, None)],
)
def test_an_absurd_maximum_length_means_none(tmp_path, said, believed):
    config = {} if said is None else {"model_max_length": said}
    assert Tokenizer.load(save(tmp_path, backend(), config)).model_max_length == believed


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing: a fast tokenizer is needed"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", [b'{"broken', b"[1]", b"\xff\xfe"])
def test_a_broken_file_is_named(tmp_path, name, content):
    save(tmp_path, backend(), {}, {})
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        Tokenizer.load(tmp_path)


def test_the_post_processor_decides_about_added_special_tokens(tmp_path):
    made = backend("<s>", "</s>")
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = Tokenizer.load(save(tmp_path, made, {"add_bos_token": False}))
    assert tokenizer.encode("a")[0] == 0
    assert tokenizer.encode("a", add_special_tokens=False)[0] != 0
    assert tokenizer.encode_with_offsets("a")[0] == (0, 0, 0)


def test_truncation_and_padding_of_the_file_are_not_applied(tmp_path):
    made = backend()
    made.enable_truncation(2)
    made.enable_padding(length=8)
    assert len(Tokenizer.load(save(tmp_path, made)).encode("abcd")) == 4


@pytest.mark.parametrize("text", ["plain text", "a\N{EURO SIGN}b \N{GRINNING FACE}!", ""])
def test_offsets_count_bytes(text):
    raw = text.encode()
    tokenizer = byte_tokenizer()
    spans = tokenizer.encode_with_offsets(text)
    assert [token_id for token_id, _, _ in spans] == tokenizer.encode(text)
    covered = sorted({(start, stop) for _, start, stop in spans})
    assert b"".join(raw[start:stop] for start, stop in covered) == raw
    assert all(raw[start:stop].decode() for start, stop in covered)  # whole characters


def test_decoding_skips_special_tokens_when_asked():
    tokenizer = byte_tokenizer()
    ids = [1, *tokenizer.encode("hi"), 0]
    assert tokenizer.decode(ids) == "<s>hi</s>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hi"


def test_a_token_has_a_text_of_its_own():
    tokenizer = byte_tokenizer()
    assert [tokenizer.token_text(token_id) for token_id in (0, *tokenizer.encode("a"))] == ["</s>", "a"]
    assert [tokenizer.is_special(token_id) for token_id in (0, *tokenizer.encode("a"))] == [True, False]
    assert tokenizer.token_id("</s>") == 0
    assert tokenizer.token_id("nowhere") is None


def test_ids_beyond_the_vocabulary_decode_to_nothing():
    assert byte_tokenizer().token_text(5000) == ""


def test_other_threads_run_while_a_long_text_is_encoded():
    tokenizer = byte_tokenizer()
    turns = 0
    encoding = threading.Thread(target=tokenizer.encode, args=("deep learning " * 60_000,))
    encoding.start()
    while encoding.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 5
