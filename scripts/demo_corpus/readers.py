"""Readers of the corpus files, which are sections of lines under headings.

They must not know how questions are phrased around a topic.
"""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent


@dataclass
class Topic:
    """A thing the model can explain. `names` are as a question puts them, with whether they are plural."""

    names: list[tuple[str, bool]]
    definition: str = ""
    details: list[str] = field(default_factory=list)
    use: str = ""
    questions: list[tuple[list[str], str]] = field(default_factory=list)


def _sections(name: str) -> list[tuple[str, list[str]]]:
    """The headings of a file, each with the lines under it; "\\n" written out in a line is a line break."""
    found: list[tuple[str, list[str]]] = []
    for line in (HERE / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            found.append((line[3:], []))
        elif line.strip() and found:
            found[-1][1].append(line.replace("\\n", "\n"))
    return found


def _split(line: str) -> list[str]:
    return [part.strip() for part in line.split("|")]


def _answered(lines: list[str]) -> list[tuple[list[str], str]]:
    """The pairs of a "?" line, which holds phrasings, and the ">" line that answers them."""
    asked = [_split(line[2:]) for line in lines if line.startswith("? ")]
    answers = [line[2:] for line in lines if line.startswith("> ")]
    return list(zip(asked, answers, strict=True))


def topics() -> list[Topic]:
    """The sections of topics.md. Raises ValueError for one without exactly one definition or a use."""
    found = []
    for heading, lines in _sections("topics.md"):
        names = [part.strip() for part in heading.split(";")]
        (definition,) = [line for line in lines if line[:2] not in {"- ", "+ ", "? ", "> "}]
        (use,) = [line[2:] for line in lines if line.startswith("+ ")]
        details = [line[2:] for line in lines if line.startswith("- ")]
        found.append(
            Topic(
                [(name.rstrip("*"), name.endswith("*")) for name in names], definition, details, use, _answered(lines)
            )
        )
    return found


def small_talk() -> list[tuple[list[str], str]]:
    """The phrasings and the answer of each piece of small_talk.md."""
    return [pair for _, lines in _sections("small_talk.md") for pair in _answered(lines)]


def prose() -> list[tuple[list[str], str]]:
    """The requests and the text of each piece of prose.md."""
    return [(_split(heading), "\n".join(lines)) for heading, lines in _sections("prose.md")]


@cache
def functions() -> tuple[tuple[list[str], str], ...]:
    """What each function of functions.md does, in several ways, and its code."""
    return tuple((_split(heading), "\n".join(lines)) for heading, lines in _sections("functions.md"))


def openings() -> list[str]:
    """The texts of openings.md, which answer no question."""
    return [line for _, lines in _sections("openings.md") for line in lines]


@cache
def phrasings(kind: str) -> tuple[str, ...]:
    """The lines of one section of phrasings.md. Raises KeyError."""
    return tuple(dict(_sections("phrasings.md"))[kind])


@cache
def words(kind: str) -> tuple[str, ...]:
    """The words of one section of words.md. Raises KeyError."""
    return tuple(" ".join(dict(_sections("words.md"))[kind]).split())


@cache
def pairs(kind: str) -> dict[str, str]:
    """The "key: value" lines of one section of words.md. Raises KeyError."""
    return {key: value for key, _, value in (line.partition(": ") for line in dict(_sections("words.md"))[kind])}
