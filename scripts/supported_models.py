"""The page of all architectures, from their table and their files.

Knows no fact of its own, and reads the files instead of importing them: that would take torch.
"""

import ast
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
TABLE = "serving.models.select"
# What a call to the builder, or an argument of attention, says of an architecture.
WORDS = {
    "rotary": "rotary positions",
    "position_embedding": "learned positions",
    "linear_bias": "ALiBi",
    "relative_bias": "relative biases",
    "window": "sliding windows",
    "softcap": "soft caps",
    "value_dim": "latent attention",
    "experts": "experts",
    "cross_attention": "encoder-decoder",
}
CHECKPOINTS = "Checkpoints: "


@dataclass(frozen=True)
class Module:
    """A file, parsed: its own definitions, and from where it has what it imports of ours."""

    tree: ast.Module
    definitions: dict[str, ast.stmt]
    imports: dict[str, str]

    @classmethod
    @cache
    def read(cls, name: str) -> "Module":
        """`serving.models.llama`, say; files are read once."""
        tree = ast.parse((ROOT / name.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8"))
        definitions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        sources = (node for node in tree.body if isinstance(node, ast.ImportFrom))
        imports = {
            alias.name: node.module
            for node in sources
            if node.module and node.module.startswith("serving.models.")
            for alias in node.names
        }
        return cls(tree, dict(definitions), imports)


def table(name: str) -> dict[str, str]:
    """A dict or a name that stands in the table's file: model type to `module:attribute`."""
    for node in Module.read(TABLE).tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            return dict(ast.literal_eval(node.value))
    raise LookupError(f"{TABLE} has no {name}")


def said(module: str, attribute: str, seen: set[tuple[str, str]]) -> Iterator[str]:
    """The words that an architecture's definition uses, with all definitions of ours that it reaches."""
    source = Module.read(module)
    if (module, attribute) in seen:
        return
    seen.add((module, attribute))
    if attribute in source.imports:
        yield from said(source.imports[attribute], attribute, seen)
    elif attribute in source.definitions:
        for node in ast.walk(source.definitions[attribute]):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                yield node.func.attr
            if isinstance(node, ast.Call):
                # What is handed through under its own name is said elsewhere, if at all.
                yield from (
                    keyword.arg
                    for keyword in node.keywords
                    if keyword.arg and not (isinstance(keyword.value, ast.Name) and keyword.value.id == keyword.arg)
                )
            if isinstance(node, ast.Name):
                yield from said(module, node.id, seen)


def row(model_type: str, architecture: str) -> str:
    """One architecture's line of the table."""
    module, _, attribute = architecture.partition(":")
    summary, _, rest = (ast.get_docstring(Module.read(module).tree) or "").partition("\n")
    checkpoints = next((part for part in rest.strip().split("\n\n") if part.startswith(CHECKPOINTS)), "")
    words = set(said(module, attribute, set()))
    has = ", ".join(word for name, word in WORDS.items() if name in words)
    cells = (f"`{model_type}`", linked(summary), " ".join(checkpoints.removeprefix(CHECKPOINTS).split()), has)
    return f"| {' | '.join(cell.rstrip('.') for cell in cells)} |"


def linked(text: str) -> str:
    """Papers with their addresses."""
    return re.sub(r"arXiv:(\d+\.\d+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def supported_models_page(notice: str, width: int) -> str:
    """Every architecture, what checkpoints people know under it, and what is served without one."""

    def paragraph(text: str) -> str:
        return textwrap.fill(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)

    return "\n".join(
        [
            "# Supported models",
            "",
            notice,
            "",
            paragraph(
                """What counts is `model_type` in a checkpoint's `config.json`. Each of these has a file of its own in
                `serving/models/`; it is held to transformers in float32 over prefill, chunks, decoding, shared
                prefixes, mixed batches and several ranks (`make test-models`). Checkpoints named here are those that
                people know under an architecture; others with the same `model_type` are served as well."""
            ),
            "",
            "| `model_type` | Architecture | Checkpoints | Has |",
            "|---|---|---|---|",
            *(row(model_type, architecture) for model_type, architecture in sorted(table("ARCHITECTURES").items())),
            "",
            paragraph(
                """All of them take their layers from one builder, so that all of them share out over devices with
                `--num-shard`, and attend by the fastest kernel there is for what they ask. Weights are safetensors."""
            ),
            "",
            "## Any other model of transformers",
            "",
            paragraph(
                """A text model whose `model_type` is not in the table, but which transformers knows, is
                run by transformers' own code with attention over the same paged cache: batched, streamed, with the
                same prefix cache and sampling. That takes a class whose attention is a function that one may choose;
                heads, scales, sliding windows and soft caps are taken from the class itself. Before it is served, the
                model is compared with what it computes by itself, in chunks and beside other rows."""
            ),
            "",
            paragraph(
                """That holds for models that read one text and write another, too: BART, mBART, PLBart, Pegasus,
                Marian (OPUS-MT), M2M100 and NLLB, Blenderbot. Input and answer may each have as many tokens
                as the model has positions. An answer begins with `decoder_start_token_id` alone: no language is forced
                upon its next token (`forced_bos_token_id`), and no beams are searched."""
            ),
            "",
            paragraph(
                """Refused, in one line that says why: a model type that transformers does not know; more than text; an
                encoder-decoder whose positions are not looked up in a table (LongT5, Switch Transformers, T5Gemma),
                whose attention takes no function (LED, Pegasus-X, BigBird-Pegasus, ProphetNet, MVP), whose experts look
                at masks (NLLB-MoE) or whose texts have two vocabularies (FSMT); layers that keep another state than
                keys and values (state spaces, linear attention, convolutions); biases, sinks or sparse choices inside
                attention; rotations that change with the longest row of a batch; and `--num-shard` above 1, since such
                a model is not shared out."""
            ),
            "",
            paragraph(
                """Code that comes with a checkpoint runs only with `--trust-remote-code`, which is off by default, and
                only for a model type that is not in the table. Give it for code that you have read."""
            ),
            "",
        ]
    )
