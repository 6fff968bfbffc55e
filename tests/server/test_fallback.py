"""A model without a file of ours behind a real server."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models.cases import randomized
from transformers import BartConfig, MambaConfig, SmolLM3Config

pytestmark = pytest.mark.server

# One token a byte, as the small model's tokenizer has it.
SIZES = {
    "vocab_size": 258, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 2,
}  # fmt: skip


def saved(config, model_directory, directory):
    theirs = randomized(config)
    theirs.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_directory / name, directory)
    return theirs


def test_it_answers_many_at_once_as_transformers_answers_each(start, model_directory, tmp_path):
    theirs = saved(SmolLM3Config(**SIZES), model_directory, tmp_path)
    server = start(f"--model-id={tmp_path}").wait_ready()
    shared = "the same beginning, which is kept: "
    prompts = ["a", "another one", *(shared + text for text in ("one", "two", "three", "one"))]

    def ask(prompt):
        parameters = {"max_new_tokens": 12, "details": True, "decoder_input_details": False}
        return server.post("/generate", {"inputs": prompt, "parameters": parameters}).json()["details"]["tokens"]

    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(ask, prompts))
    for prompt, tokens in zip(prompts, answers, strict=True):
        ids = server.post("/tokenize", {"inputs": prompt}).json()
        given = torch.tensor([[token["id"] for token in ids]])
        want = theirs.generate(given, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, given.shape[1] :]
        assert [token["id"] for token in tokens] == want.tolist()


def test_an_encoder_decoder_answers_as_transformers_answers_as_far_as_its_positions_go(
    start, model_directory, tmp_path
):
    config = BartConfig(
        vocab_size=258, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=80, decoder_ffn_dim=80, max_position_embeddings=48, pad_token_id=2,
        bos_token_id=1, eos_token_id=0, decoder_start_token_id=1, forced_eos_token_id=None,
    )  # fmt: skip
    theirs = saved(config, model_directory, tmp_path)
    server = start(f"--model-id={tmp_path}").wait_ready()
    told = server.get("/info").json()
    assert (told["max_input_tokens"], told["max_total_tokens"]) == (48, 96)

    def ask(text, **parameters):
        return server.post("/generate", {"inputs": text, "parameters": {"details": True, **parameters}})

    texts = ["a", "another one", "a text of more than thirty tokens"]
    with ThreadPoolExecutor(len(texts)) as pool:
        answers = list(pool.map(ask, texts))
    for text, answer in zip(texts, answers, strict=True):
        ids = torch.tensor([[token["id"] for token in server.post("/tokenize", {"inputs": text}).json()]])
        want = theirs.generate(ids, max_new_tokens=47, do_sample=False)[0, 1:]
        assert [token["id"] for token in answer.json()["details"]["tokens"]] == want.tolist()
    refused = ask("a", max_new_tokens=48)
    assert refused.status_code == 422
    assert "`max_new_tokens` must be <= 47" in json.dumps(refused.json())
    assert ask("z" * 49).status_code == 422


def test_one_that_cannot_be_served_ends_the_server_with_one_line(start, model_directory, tmp_path):
    saved(MambaConfig(vocab_size=258, hidden_size=64, num_hidden_layers=2, state_size=8), model_directory, tmp_path)
    server = start(f"--model-id={tmp_path}")
    assert server.wait_exit(60) not in (0, 2)
    errors = [line for line in server.lines if " ERROR " in line]
    assert len(errors) == 1, server.lines
    assert "no attention function" in errors[0]
    assert not any("Traceback" in line for line in server.lines)
