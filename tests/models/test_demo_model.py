"""The demo model: small enough to ship, and good enough to greet a visitor."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

DIRECTORY = Path(__file__).parents[2] / "serving" / "demo_model"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DIRECTORY)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def complete(model, tokenizer):
    def complete(prompt: str, new_tokens: int = 40) -> tuple[str, bool]:
        """The greedy continuation, and whether the model ended it by itself."""
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
        new = out[0, ids.shape[1] :].tolist()
        return tokenizer.decode(new, skip_special_tokens=True), new[-1] in model.generation_config.eos_token_id

    return complete


@pytest.fixture(scope="module")
def chat(complete, tokenizer):
    def chat(*turns: str) -> str:
        """The greedy answer to the last of the turns, which are the user's and the assistant's by turns."""
        messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        text, ended = complete(prompt, 100)
        assert ended
        return text

    return chat


def test_weights_are_small_enough_for_a_package():
    assert (DIRECTORY / "model.safetensors").stat().st_size <= 8_000_000


@pytest.mark.parametrize("prompt", ["What is Deep Learning?", "What is deep learning?", "what is deep learning?"])
def test_raw_prompt_about_deep_learning_gets_a_true_sentence(complete, prompt):
    text, _ = complete(prompt)
    assert text.startswith(
        " Deep learning is a branch of machine learning that trains neural networks with many layers."
    )


def test_raw_answer_ends_by_itself(complete):
    text, ended = complete("What is the KV cache?", 60)
    assert text.startswith(" The KV cache stores the attention keys and values")
    assert ended


def test_repetitive_code_is_continued(complete):
    text, _ = complete("def add(a, b):")
    assert text.startswith("\n    return a + b\n")


def test_chat_knows_who_it_is(chat):
    assert "Weir" in chat("Who are you?")
    assert chat("What is Weir?").startswith("Weir is a text-generation inference server")
    assert chat("Hello!").startswith("Hello!")


def test_chat_follows_the_conversation(chat):
    first = chat("What is paged attention?")
    assert first.startswith("Paged attention")
    assert chat("What is paged attention?", first, "Why is it useful?").startswith("Paged attention")


def test_chat_admits_what_it_does_not_know(chat):
    assert chat("What is a xylophone?").startswith("I do not know that")


def test_json_on_request_is_json(chat, complete):
    assert set(json.loads(chat("Give me a JSON object with name and age"))) == {"name", "age"}
    text, _ = complete("Give me a JSON object with name and age")
    assert set(json.loads(text)) == {"name", "age"}


def test_offered_tool_is_called(complete, tokenizer):
    parameters = {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]}
    tool = {"type": "function", "function": {"name": "get_weather", "description": "", "parameters": parameters}}
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    prompt = tokenizer.apply_chat_template(messages, tools=[tool], tokenize=False, add_generation_prompt=True)
    text, _ = complete(prompt, 60)
    call = json.loads(text.removeprefix("<tool_call>").removesuffix("</tool_call>"))
    assert call["name"] == "get_weather"
    assert list(call["arguments"].values()) == ["Paris"]


@pytest.mark.parametrize(
    "text", ["", " ", "naïve café", "日本語\n\t", "👩‍👩‍👧‍👦 🇨🇭", "\u0000\u200b\ufffd", "a  b   c \r\n", "१२३ 456"]
)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_nothing_is_added_to_a_raw_prompt(tokenizer):
    assert tokenizer("Hello")["input_ids"] == tokenizer("Hello", add_special_tokens=False)["input_ids"]


def test_template_takes_system_messages_and_content_parts(tokenizer):
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": "!"}]},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
    )
