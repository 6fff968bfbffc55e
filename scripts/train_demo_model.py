"""Train the demo model: text of our own -> a byte-level BPE tokenizer and a tiny Llama, checked by its own answers.

It must not know the server: what it writes is an ordinary Hugging Face model directory.
"""

import argparse
import json
import math
import random
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scripts.demo_corpus.corpus import Corpus
from scripts.demo_corpus.document import Document, Raw

DESCRIPTION = """\
Train the tiny chat model that Weir serves when no other model is given.

The corpus is generated from the texts in scripts/demo_corpus/ (nothing is downloaded). A tokenizer is trained on it,
then a Llama of about 3.6 million parameters, on two CPU threads (fp32 weights, bfloat16 products). It ends by asking
the new model a few questions, and exits with 1 when it does not know what deep learning is. The same options give
the same model on the same machine with the same versions of the libraries.
"""
EPILOG = """\
examples:
  python -m scripts.train_demo_model                              retrain serving/demo_model (15 minutes, 2 cores)
  python -m scripts.train_demo_model --steps 50 --out build/demo  a quick look at the whole path; useless as a model
"""

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TOOL_CALL, TOOL_CALL_END = "<tool_call>", "</tool_call>"
VOCABULARY = 3072
MAX_POSITIONS = 2048
MAX_DOCUMENT = 512  # tokens; longer documents are dropped, not cut
MAX_BYTES = 8_000_000
PROMPT_WEIGHT = 0.1  # of the loss on tokens that a user writes: enough for sensible prompt logprobs
HELD_OUT = 600
CHECKED_PROMPT, CHECKED_ANSWER = "What is Deep Learning?", " Deep learning is a branch of machine learning"
SAMPLES = (
    CHECKED_PROMPT,
    "What is deep learning?",
    "what is machine learning",
    "Explain continuous batching.",
    "What is the capital of France?",
    "What is a zeppelin?",
    "Deep learning is",
    "def add(a, b):",
    "Give me a JSON object with name and age",
)
CHAT_SAMPLES = (
    "Hello!",
    "Who are you?",
    "What is Weir?",
    "What can you do?",
    "What is paged attention?",
    "Who was Ramses?",
    "Give me a JSON object with name and city.",
)

# ChatML, with tools as Hermes and Qwen write them. Content may be a string or a list of parts.
CHAT_TEMPLATE = """\
{%- macro text(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content -%}
        {%- for part in content -%}
            {%- if part.type == 'text' -%}{{- part.text -}}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set system = text(messages[0].content) if messages and messages[0].role == 'system' else '' -%}
{%- if system or tools -%}
    {{- '<|im_start|>system\\n' + system -}}
    {%- if tools -%}
        {{- ('\\n\\n' if system else '') + 'You may call these functions:\\n<tools>' -}}
        {%- for tool in tools -%}
            {{- '\\n' + (tool | tojson) -}}
        {%- endfor -%}
        {{- '\\n</tools>' -}}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if not (loop.first and message.role == 'system') -%}
        {{- '<|im_start|>' + message.role + '\\n' + text(message.content) -}}
        {%- for call in message.tool_calls or [] -%}
            {%- set function = call.function -%}
            {{- '<tool_call>\\n{"name": ' + (function.name | tojson) + ', "arguments": ' -}}
            {{- function.arguments if function.arguments is string else (function.arguments | tojson) -}}
            {{- '}\\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
_ASSISTANT_TURN = re.compile(rf"(?<={re.escape(IM_START)}assistant\n).*?{re.escape(IM_END)}", re.DOTALL)


@dataclass(frozen=True)
class Example:
    """A document as token ids, with the weight of each token in the loss."""

    ids: list[int]
    weights: list[float]


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text can be encoded, digits stand alone, nothing is added at the start."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [END_OF_TEXT, IM_START, IM_END]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Not special: they stay visible in the answer, where a tool call is read from.
    tokenizer.add_tokens([AddedToken(TOOL_CALL, normalized=False), AddedToken(TOOL_CALL_END, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[IM_START],
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
        chat_template=CHAT_TEMPLATE,
    )


def written(document: Document, tokenizer: PreTrainedTokenizerFast) -> tuple[str, list[tuple[int, int]]]:
    """The document as the model sees it, and the spans (in characters) that the model itself writes."""
    if isinstance(document, Raw):
        text = document.prompt + document.answer + END_OF_TEXT
        return text, [(len(document.prompt), len(text))]
    text = tokenizer.apply_chat_template(list(document.messages), tools=list(document.tools) or None, tokenize=False)
    return text, [match.span() for match in _ASSISTANT_TURN.finditer(text)]


def encode(documents: list[Document], tokenizer: PreTrainedTokenizerFast) -> Iterator[Example]:
    """The documents as examples; those longer than MAX_DOCUMENT are left out."""
    pairs = [written(document, tokenizer) for document in documents]
    encodings = tokenizer.backend_tokenizer.encode_batch([text for text, _ in pairs])
    for (_, spans), encoding in zip(pairs, encodings, strict=True):
        weights = [
            1.0 if any(start <= at < stop for start, stop in spans) else PROMPT_WEIGHT for at, _ in encoding.offsets
        ]
        if len(weights) <= MAX_DOCUMENT:
            yield Example(encoding.ids, weights)


def padded(length: int) -> int:
    """The width of a row for a text of this length: one of few, because CPU kernels are made once for each shape."""
    return (length + 6) // 8 * 8 + 1


def batches(examples: list[Example], tokens: int, rng: random.Random) -> Iterator[list[Example]]:
    """Batches of about `tokens` tokens, each of documents of similar length so that little is padding.

    One document is one row: nothing is packed behind something else, so training sees what serving sees.
    """
    order = sorted(examples, key=lambda example: (len(example.ids), rng.random()))
    made: list[list[Example]] = [[]]
    for example in order:
        if (len(made[-1]) + 1) * padded(len(example.ids)) > tokens and made[-1]:
            made.append([])
        made[-1].append(example)
    rng.shuffle(made)
    yield from made


def tensors(batch: list[Example], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [B, T] int64 and weights [B, T] float32, padded on the right with `pad` and 0."""
    width = padded(max(len(example.ids) for example in batch))
    ids = torch.full((len(batch), width), pad)
    weights = torch.zeros(len(batch), width)
    for row, example in enumerate(batch):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        weights[row, : len(example.ids)] = torch.tensor(example.weights)
    return ids, weights


def loss_of(model: LlamaForCausalLM, batch: list[Example], pad: int) -> torch.Tensor:
    """The weighted mean of the cross entropy (nats per token).

    Attention is causal, so padding on the right needs no mask.
    """
    ids, weights = tensors(batch, pad)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    targets = weights[:, 1:].flatten()
    return (losses * targets).sum() / targets.sum()


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, examples: list[Example], pad: int) -> float:
    """The mean loss (nats per token) on the tokens that the model itself has to write."""
    answers = [Example(e.ids, [float(weight == 1.0) for weight in e.weights]) for e in examples]
    total = count = 0.0
    for batch in batches(answers, 4096, random.Random(0)):
        tokens = sum(sum(example.weights[1:]) for example in batch)
        total += loss_of(model, batch, pad).item() * tokens
        count += tokens
    return total / count


def texts(document: Document) -> list[str]:
    """The words of a document without any dress."""
    if isinstance(document, Raw):
        return [document.prompt + document.answer]
    return [message["content"] for message in document.messages]


def rare(documents: Iterator[Document], common: list[Document]) -> Iterator[Document]:
    """Those that are not among the common ones: held-out loss should not take the plain greetings out of training."""
    seen = {repr(document) for document in common}
    return (document for document in documents if repr(document) not in seen)


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh Llama with grouped-query attention and tied embeddings."""
    ends = tokenizer.convert_tokens_to_ids([IM_END, END_OF_TEXT])
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id, do_sample=False)
    return model


def optimizer_for(model: LlamaForCausalLM, rate: float) -> torch.optim.AdamW:
    """AdamW that decays the matrices and leaves the norms alone."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() == 2], "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))


def rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 3 % of the steps, then a cosine down to nothing."""
    warm = max(1, steps * 3 // 100)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def endless(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, held_out: set[tuple[int, ...]], tokens: int, seed: int
) -> Iterator[list[Example]]:
    """Batches from ever new documents, without those that are held out."""
    rng = random.Random(seed)
    while True:
        examples = encode(list(corpus.documents(4000)), tokenizer)
        yield from batches([example for example in examples if tuple(example.ids) not in held_out], tokens, rng)


def train(model: LlamaForCausalLM, supply: Iterator[list[Example]], steps: int, peak: float, pad: int) -> float:
    """The training loop. Returns the mean loss (nats per token) of the last twentieth of the steps."""
    optimizer = optimizer_for(model, peak)
    model.train()
    recent: list[float] = []
    bar = tqdm(range(steps), unit="step", mininterval=5)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps, peak)
        loss = loss_of(model, next(supply), pad)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent = [*recent[-max(1, steps // 20) :], loss.item()]
        bar.set_postfix(loss=f"{sum(recent[-50:]) / len(recent[-50:]):.3f}", refresh=False)
    model.eval()
    return sum(recent) / len(recent)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the directory, in bfloat16. Raises ValueError when the weights are larger than MAX_BYTES."""
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out, save_jinja_files=False)
    # The class by the name that older releases of transformers know too.
    config = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    config = {**config, "tokenizer_class": "PreTrainedTokenizerFast"}
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (out / "model.safetensors").chmod(0o644)
    size = (out / "model.safetensors").stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"model.safetensors has {size} bytes, more than {MAX_BYTES}")


def answer(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, new_tokens: int) -> str:
    """The greedy continuation of the prompt, as text without special tokens."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def check(out: Path) -> bool:
    """Load what was written, print some answers, and say whether the main prompt is answered."""
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    for prompt in SAMPLES:
        print(json.dumps({"raw": prompt, "answer": answer(model, tokenizer, prompt, 40)}))
    for prompt in CHAT_SAMPLES:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        print(json.dumps({"chat": prompt, "answer": answer(model, tokenizer, text, 80)}))
    return answer(model, tokenizer, CHECKED_PROMPT, 40).startswith(CHECKED_ANSWER)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.train_demo_model",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, default=Path("serving/demo_model"), help="directory to write (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=1800, help="optimizer steps (default: %(default)s)")
    parser.add_argument(
        "--batch-tokens", type=int, default=2048, help="tokens per step, padding included (default: %(default)s)"
    )
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate (default: %(default)s)")
    parser.add_argument(
        "--threads",
        type=int,
        default=2,
        help="CPU threads (default: %(default)s); another number gives another rounding",
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="seed of the corpus, the order and the weights (default: %(default)s)"
    )
    return parser.parse_args()


def main() -> int:
    """Train, save, check. Returns the exit status."""
    options = arguments()
    started = time.monotonic()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    torch.use_deterministic_algorithms(True)

    corpus = Corpus(options.seed)
    common = list(corpus.documents(12_000))
    tokenizer = train_tokenizer(text for document in common for text in texts(document))
    held_out = list(encode(list(rare(Corpus(options.seed + 1).documents(HELD_OUT * 3), common)), tokenizer))[:HELD_OUT]
    known = {tuple(example.ids) for example in held_out}
    pad: int = tokenizer.pad_token_id

    model = new_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens in the vocabulary")
    supply = endless(corpus, tokenizer, known, options.batch_tokens, options.seed)
    trained = train(model, supply, options.steps, options.lr, pad)
    unseen = held_out_loss(model, held_out, pad)
    print(f"train loss {trained:.4f}, held-out loss {unseen:.4f} (nats per token; held out: on the answers)")
    options.out.mkdir(parents=True, exist_ok=True)
    save(model, tokenizer, options.out)
    print(f"wrote {options.out} after {time.monotonic() - started:.0f} s")

    if not check(options.out):
        print(f"the model does not answer {CHECKED_PROMPT!r}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
