"""How people phrase and misspell a question about a topic.

It must not know the answers of anything but topics.
"""

import random

from scripts.demo_corpus.document import Exchange
from scripts.demo_corpus.readers import Topic, phrasings

PLAINLY = "What {is} {x}?"


def ask(template: str, name: tuple[str, bool]) -> str:
    """The template with the name put in, its verb agreeing, and its first letter large."""
    text, plural = name
    verbs = {"is": "are", "does": "do"} if plural else {"is": "is", "does": "does"}
    question = template.format(x=text, **verbs)
    return question[0].upper() + question[1:]


def full_text(topic: Topic) -> str:
    """Everything about the topic, as one paragraph."""
    return " ".join([topic.definition, *topic.details, topic.use])


def short_answer(topic: Topic) -> str:
    """The definition and the first detail."""
    return " ".join([topic.definition, *topic.details[:1]])


def rest(topic: Topic) -> str:
    """What short_answer leaves out."""
    return " ".join([*topic.details[1:], topic.use])


def both(one: Topic, other: Topic, rng: random.Random) -> Exchange:
    """A question about two topics, answered by their two definitions."""
    question = rng.choice(phrasings("versus")).format(x=one.names[0][0], y=other.names[0][0])
    return Exchange(question, f"{one.definition} {other.definition}")


def about(topic: Topic, rng: random.Random) -> Exchange:
    """A question of some kind about the topic, and its answer."""
    kind = rng.random()
    name = topic.names[0] if rng.random() < 0.5 else rng.choice(topic.names)
    if kind < 0.1:
        return Exchange(ask(PLAINLY, name), short_answer(topic))
    if kind < 0.5:
        return Exchange(ask(rng.choice(phrasings("ask")), name), short_answer(topic))
    if kind < 0.6:
        return Exchange(ask(rng.choice(phrasings("brief")), name), topic.definition)
    if kind < 0.72:
        return Exchange(ask(rng.choice(phrasings("long")), name), full_text(topic))
    if kind < 0.84 or not topic.questions:
        return Exchange(ask(rng.choice(phrasings("use")), name), topic.use)
    asked, answer = rng.choice(topic.questions)
    return Exchange(rng.choice(asked), answer)


def _typo(text: str, rng: random.Random) -> str:
    at = rng.randrange(1, max(2, len(text) - 1))
    if rng.random() < 0.5:
        return text[:at] + text[at + 1 :]
    return text[: at - 1] + text[at : at + 1] + text[at - 1 : at] + text[at + 1 :]


def _title_case(text: str) -> str:
    words = text.split(" ")
    return " ".join(word if i == 0 or len(word) < 4 else word[0].upper() + word[1:] for i, word in enumerate(words))


def vary(question: str, rng: random.Random) -> str:
    """The same question as different people type it: other case, no punctuation, a typo."""
    kind = rng.random()
    if kind < 0.14:
        return _title_case(question)
    if kind < 0.26:
        return question.lower()
    if kind < 0.3:
        return question.upper()
    if kind < 0.35:
        return question.rstrip("?.!")
    if kind < 0.39:
        return question.lower().rstrip("?.!")
    if kind < 0.43:
        return _typo(question, rng)
    return question
