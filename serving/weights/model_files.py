"""Which of a model's files are needed to serve it, and where they are once they are here.

Knows no network and no tensor: it judges names, and reads an index.
"""

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

from msgspec import Struct

from serving.adapter_names import NamedAdapter
from serving.errors import ModelError
from serving.protocol import Origin
from serving.weights.weight_files import INDEX, SINGLE_FILE, named_in_index, unindexed

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_DESCRIPTIONS = (
    CONFIG, INDEX, "*_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "*.tiktoken", "spiece.model", "sentencepiece*.model", "chat_template*",
    "*.py",  # code that comes with a model, which is run by whoever trusts it and by nobody else
)  # fmt: skip
_NAMED_TEMPLATES = "additional_chat_templates"
_UNSAFE = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_NO_WEIGHTS = ("training_args.bin", "optimizer.*", "scheduler.*", "rng_state*")


class ModelFiles(Struct, frozen=True, kw_only=True):
    """Where a model lies, ready to be loaded.

    Attributes:
        directory: holds config.json and the weights.
        adapter_directory: holds an adapter that is merged into the weights while they are loaded.
        origin: what a hub told of the model that was asked for, which is the adapter where there is one.
        adapters: by their names, the directories of the adapters that requests may ask for.
    """

    directory: str
    adapter_directory: str | None = None
    origin: Origin = Origin()
    adapters: dict[str, str] = {}

    @property
    def tokenizer_directory(self) -> Path:
        """Where the tokenizer comes from: an adapter's own wins, since it may know more tokens."""
        return tokenizer_directory(self.directory, self.adapter_directory)


def tokenizer_directory(directory: str, adapter_directory: str | None) -> Path:
    """See `ModelFiles.tokenizer_directory`."""
    if adapter_directory is not None and (Path(adapter_directory) / "tokenizer.json").is_file():
        return Path(adapter_directory)
    return Path(directory)


class Source(Protocol):
    """A place that files can be fetched from.

    Attributes:
        name: how the operator called it.
        sizes: bytes of every file that is there, by its name; directories are written with `/`.
    """

    name: str
    sizes: Mapping[str, int]

    def fetch(self, names: Sequence[str]) -> Path:
        """Bring these files here, or find them here. Returns the directory that holds them under their names.

        Raises:
            ConfigurationError: it cannot be done; the text says what to do.
        """
        ...


def collect(source: Source) -> Path:
    """Fetch what is needed of a model or an adapter: first what describes it, then its weights.

    Raises:
        ModelError: there is nothing that could be served.
        ConfigurationError: as `Source.fetch`.
    """
    names = source.sizes.keys()
    descriptions = description_names(names)
    weight_names(names, None, source.name)  # before anything is fetched
    directory = source.fetch(descriptions)
    indexed = indexed_names(directory / INDEX) if INDEX in descriptions and not is_adapter(names) else None
    source.fetch(weight_names(names, indexed, source.name))
    return directory


def collect_adapter(source: Source) -> Path:
    """Fetch an adapter for a model that is there already: its configuration and its weights, whatever lies beside them.

    Raises:
        ModelError: it is none, or one whose weights are no safetensors.
        ConfigurationError: as `Source.fetch`.
    """
    check_adapter(source.sizes.keys(), source.name)
    return source.fetch([ADAPTER_CONFIG, ADAPTER_WEIGHTS])


def check_adapter(names: Collection[str], where: str) -> None:
    """Raise ModelError where files with these names hold no adapter that could be loaded."""
    if ADAPTER_CONFIG not in names:
        raise ModelError(f"{where} holds no {ADAPTER_CONFIG}: it is no adapter.")
    if ADAPTER_WEIGHTS not in names:
        raise ModelError(f"{where} holds no {ADAPTER_WEIGHTS}; only safetensors are served.")


def local_adapter(adapter: NamedAdapter) -> str:
    """The directory of an adapter that lies in one. Raises ModelError where it is no whole adapter."""
    try:
        check_adapter(_names(Path(adapter.place)), adapter.place)
    except ModelError as error:
        raise ModelError(f"The adapter {adapter.name}: {error}") from error
    return adapter.place


def is_adapter(names: Collection[str]) -> bool:
    """Whether files with these names are an adapter alone, without the model that it belongs to."""
    return ADAPTER_CONFIG in names and (CONFIG not in names or (ADAPTER_WEIGHTS in names and not _safetensors(names)))


def description_names(names: Collection[str]) -> list[str]:
    """Those that say what a model is: its configuration, its tokenizer, its chat templates; sorted."""
    return sorted(
        name
        for name in names
        if _is_named_template(name)
        or ("/" not in name and any(fnmatchcase(name, pattern) for pattern in _DESCRIPTIONS))
    )


def weight_names(names: Collection[str], indexed: Collection[str] | None, where: str) -> list[str]:
    """Those that hold the weights, each tensor once; sorted.

    Args:
        indexed: the files that the checkpoint's index names, where it has one.
        where: the model's name for an error.

    Raises:
        ModelError: there are none that can be served.
    """
    if CONFIG not in names and ADAPTER_CONFIG not in names:
        raise ModelError(f"{where} holds no {CONFIG}: it is not a model that transformers could load.")
    found = [ADAPTER_WEIGHTS] if is_adapter(names) else sorted(indexed or _safetensors(names))
    missing = [name for name in found if name not in names]
    if not missing and found:
        return found
    if any(_is_unsafe(name) for name in names):
        raise ModelError(
            f"{where} holds its weights as .bin or .pt files only, which can run code when they are read: download it "
            "and turn it into safetensors with `weir convert`."
        )
    if missing and indexed:
        raise ModelError(f"{missing[0]} is named in {INDEX} and not among the files of {where}.")
    raise ModelError(f"{where} holds no .safetensors weights; only those are served.")


def indexed_names(index: Path) -> list[str]:
    """The files that a checkpoint's index names, sorted. Raises ModelError where it is broken."""
    return sorted(set(named_in_index(index).values()))


def check_whole(directory: Path) -> None:
    """Raise ModelError where a directory holds no whole model or adapter."""
    names = _names(directory)
    indexed = indexed_names(directory / INDEX) if INDEX in names and not is_adapter(names) else None
    weight_names(names, indexed, str(directory))


def missing_names(directory: Path) -> list[str]:
    """What a directory lacks to be a whole model or adapter; empty where it lacks nothing. Raises ModelError."""
    names = _names(directory)
    if is_adapter(names):
        return [name for name in (ADAPTER_WEIGHTS,) if name not in names]
    wanted = [CONFIG, *(indexed_names(directory / INDEX) if INDEX in names else _safetensors(names) or [SINGLE_FILE])]
    return [name for name in wanted if name not in names]


def _names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if path.exists()}  # links of a cache may lead nowhere


def _safetensors(names: Collection[str]) -> list[str]:
    found = [name for name in names if name.endswith(".safetensors") and "/" not in name and name != ADAPTER_WEIGHTS]
    return unindexed(found)


def _is_named_template(name: str) -> bool:
    # Exactly one directory: a name in an object store may be any text, and one with `..` leads elsewhere.
    directory, _, file = name.partition("/")
    return directory == _NAMED_TEMPLATES and "/" not in file and file.endswith(".jinja")


def _is_unsafe(name: str) -> bool:
    if "/" in name or any(fnmatchcase(name, pattern) for pattern in _NO_WEIGHTS):
        return False
    return any(fnmatchcase(name, pattern) for pattern in _UNSAFE)
