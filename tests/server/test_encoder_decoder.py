"""A tiny T5 behind the real server: its encoder reads what is asked, its decoder writes the answer."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
import tokenizers
import torch
from models.cases import randomized
from server.conftest import SMALL, Server
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import T5Config

QUESTIONS = ["a", "bad cab", "face the deaf cafe", "a bee fed a dead bee", "hide the hidden egg " * 4, "dig"]
TOKENS = 24


@pytest.fixture(scope="module")
def theirs():
    config = T5Config(
        vocab_size=40, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, n_positions=96,
    )  # fmt: skip
    return randomized(config)


@pytest.fixture(scope="module")
def tokenizer():
    """As T5's own: pieces with a score, a mark before every word, and `</s>` behind every text."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz", "▁a", "▁b", "▁the", "ee", "ea", "▁d"]
    made = tokenizers.Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=2))
    made.add_special_tokens(["<pad>", "</s>", "<unk>"])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return made


@pytest.fixture(scope="module")
def url(theirs, tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("t5")
    theirs.save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    words = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "model_max_length": 96}
    (directory / "tokenizer_config.json").write_text(json.dumps(words))
    server = Server([f"--model-id={directory}", *SMALL], {})
    try:
        yield server.wait_ready().url
    finally:
        server.stop()


@pytest.fixture(scope="module")
def expected(theirs, tokenizer):
    """transformers' own greedy answer to each question: (ids, text)."""
    answers = {}
    for question in QUESTIONS:
        ids = torch.tensor([tokenizer.encode(question).ids])
        with torch.inference_mode():
            out = theirs.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0, 1:].tolist()
        answers[question] = out, tokenizer.decode(out)
    return answers


def ask(url, question):
    body = {"inputs": question, "parameters": {"max_new_tokens": TOKENS, "details": True}}
    return requests.post(f"{url}/generate", json=body, timeout=60)


def test_answers_are_transformers_own(url, expected, tokenizer):
    for question, (ids, text) in expected.items():
        response = ask(url, question)
        told = response.json()
        assert [token["id"] for token in told["details"]["tokens"]] == ids
        assert told["generated_text"] == text
        assert response.headers["x-prompt-tokens"] == str(len(tokenizer.encode(question).ids))


def test_a_stream_tells_the_same_and_how_long_the_input_was(url, expected, tokenizer):
    question = QUESTIONS[3]
    body = {"inputs": question, "parameters": {"max_new_tokens": TOKENS, "details": True}}
    with requests.post(f"{url}/generate_stream", json=body, stream=True, timeout=60) as response:
        events = [json.loads(line[5:]) for line in response.iter_lines() if line.startswith(b"data:")]
    assert [event["token"]["id"] for event in events] == expected[question][0]
    assert events[-1]["generated_text"] == expected[question][1]
    assert events[-1]["details"]["input_length"] == len(tokenizer.encode(question).ids)


def test_requests_together_are_answered_as_alone(url, expected):
    asked = QUESTIONS * 4
    with ThreadPoolExecutor(len(asked)) as pool:
        told = list(pool.map(lambda question: ask(url, question).json()["generated_text"], asked))
    assert told == [expected[question][1] for question in asked]


def test_both_texts_may_be_as_long_as_in_training(url):
    told = requests.get(f"{url}/info", timeout=60).json()
    assert (told["max_input_tokens"], told["max_total_tokens"]) == (96, 192)
    assert requests.post(f"{url}/generate", json={"inputs": "z" * 94}, timeout=60).status_code == 200
    response = requests.post(f"{url}/generate", json={"inputs": "z" * 97}, timeout=60)
    assert (response.status_code, response.json()["error"]) == (
        422, "Input validation error: `inputs` must have less than 96 tokens. Given: 99",
    )  # fmt: skip


def test_the_input_stands_before_the_answer_where_that_is_asked_for(url, expected):
    question = QUESTIONS[1]
    body = {"inputs": question, "parameters": {"max_new_tokens": TOKENS, "return_full_text": True}}
    told = requests.post(f"{url}/generate", json=body, timeout=60).json()
    assert told["generated_text"] == question + expected[question][1]


def test_without_a_template_chats_are_refused_as_ever(url):
    body = {"model": "x", "messages": [{"role": "user", "content": "a"}]}
    response = requests.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 422
    assert "template not found" in response.text


def test_a_completion_reads_its_prompt(url, expected):
    question = QUESTIONS[2]
    body = {"model": "x", "prompt": question, "max_tokens": TOKENS, "temperature": 0}
    told = requests.post(f"{url}/v1/completions", json=body, timeout=60).json()
    assert told["choices"][0]["text"] == expected[question][1]
