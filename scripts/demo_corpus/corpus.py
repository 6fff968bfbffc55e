"""The mixture: how much of each kind of text the model sees, raw and as conversations.

It must not know tokens; a document is whole, and the training script never cuts one that fits.
"""

import random
from collections.abc import Iterator

from scripts.demo_corpus.document import Chat, Document, Exchange, JsonObject, Raw
from scripts.demo_corpus.phrasing import PLAINLY, about, ask, both, full_text, rest, short_answer, vary
from scripts.demo_corpus.readers import openings, pairs, phrasings, prose, small_talk, topics, words
from scripts.demo_corpus.structured import arithmetic, code, copy, extraction, json_object, pattern
from scripts.demo_corpus.tools import tool_chat
from scripts.demo_corpus.unknown import capital, invented_word, unknown

# What a visitor asks first is seen more often.
FIRST = frozenset(
    {"deep learning", "machine learning", "a neural network", "Weir", "a transformer"}
    | {"Hello!", "Who are you?", "What can you do?", "Thanks", "How are you?"}
)


class Corpus:
    """An endless supply of documents; the same seed gives the same ones."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._topics = topics()
        self._small_talk = small_talk()
        self._small_weights = [3.0 if asked[0] in FIRST else 1.0 for asked, _ in self._small_talk]
        self._prose = prose()
        self._openings = openings() + [
            f"The capital of {country} is {city}." for country, city in pairs("capitals").items()
        ]
        self._weights = [3.0 if topic.names[0][0] in FIRST else 1.0 for topic in self._topics]
        self._names = {name.lower() for topic in self._topics for name, _ in topic.names}

    def documents(self, count: int) -> Iterator[Document]:
        """The next `count` documents."""
        return (self._document() for _ in range(count))

    def _topic_exchange(self) -> Exchange:
        topic, other = self._rng.choices(self._topics, self._weights, k=2)
        if self._rng.random() < 0.04 and topic is not other:
            return both(topic, other, self._rng)
        return about(topic, self._rng)

    def _small_exchange(self) -> Exchange:
        asked, answer = self._rng.choices(self._small_talk, self._small_weights)[0]
        return Exchange(self._rng.choice(asked), answer)

    def _prose_exchange(self) -> Exchange:
        asked, answer = self._rng.choice(self._prose)
        return Exchange(self._rng.choice(asked), answer)

    def _unknown_exchange(self) -> Exchange:
        while True:
            exchange = unknown(self._rng)
            thing = exchange.question.lower().rstrip("?.").removeprefix("what is ")
            if thing not in self._names:
                return exchange

    def _exchange(self) -> Exchange:
        kind = self._rng.random()
        if kind < 0.45:
            return self._vary(self._topic_exchange())
        if kind < 0.65:
            return self._vary(self._small_exchange())
        if kind < 0.78:
            return self._vary(self._unknown_exchange())
        if kind < 0.815:
            return self._vary(self._prose_exchange())
        if kind < 0.865:
            return self._vary(json_object(self._rng))
        return self._rng.choice((extraction, copy, code, code, capital, arithmetic))(self._rng)

    def _vary(self, exchange: Exchange) -> Exchange:
        return Exchange(vary(exchange.question, self._rng), exchange.answer)

    def _document(self) -> Document:
        kind = self._rng.random()
        if kind < 0.38:
            return self._raw()
        if kind < 0.76:
            return self._chat([self._exchange()])
        if kind < 0.83:
            return self._chat([self._exchange() for _ in range(self._rng.choice((2, 2, 3)))])
        if kind < 0.91:
            return self._chat(self._follow_up())
        if kind < 0.93:
            return self._chat(self._introduction())
        if kind < 0.955:
            return tool_chat(self._rng.choice((self._topic_exchange, self._small_exchange))(), self._rng)
        return self._plain()

    def _raw(self) -> Raw:
        exchange = self._exchange()
        kind = self._rng.random()
        prompt = exchange.question
        if kind < 0.08:
            prompt = f"Q: {prompt}\nA:"
        elif kind < 0.16:
            return Raw(f"{prompt}\n", exchange.answer)
        elif kind < 0.2:
            return Raw(f"{prompt}\n\n", exchange.answer)
        elif kind < 0.22:
            return Raw(f"{prompt} ", exchange.answer)
        closed = prompt.endswith(("?", ".", "!", ":", "="))
        return Raw(prompt, (" " if closed else "\n") + exchange.answer)

    def _plain(self) -> Raw:
        kind = self._rng.random()
        if kind < 0.3:
            return Raw("", full_text(self._rng.choice(self._topics)))
        if kind < 0.4:
            return Raw("", self._rng.choice(self._prose)[1])
        if kind < 0.7:
            return Raw("", self._rng.choice(self._openings))
        return Raw("", pattern(self._rng))

    def _chat(self, exchanges: list[Exchange]) -> Chat:
        messages: list[JsonObject] = []
        if self._rng.random() < 0.3:
            messages.append({"role": "system", "content": self._system()})
        for exchange in exchanges:
            messages.append({"role": "user", "content": exchange.question})
            messages.append({"role": "assistant", "content": exchange.answer})
        return Chat(tuple(messages))

    def _system(self) -> str:
        if self._rng.random() < 0.75:
            return self._rng.choice(phrasings("system"))
        return f"You are a {self._rng.choice(words('plain'))} {invented_word(self._rng)}."

    def _follow_up(self) -> list[Exchange]:
        topic, other = self._rng.choices(self._topics, self._weights, k=2)
        exchanges = [self._vary(Exchange(ask(PLAINLY, self._rng.choice(topic.names)), short_answer(topic)))]
        for _ in range(self._rng.choice((1, 1, 2))):
            kind = self._rng.random()
            if kind < 0.35:
                exchanges.append(Exchange(self._rng.choice(phrasings("more")), rest(topic)))
            elif kind < 0.7:
                exchanges.append(Exchange(self._rng.choice(phrasings("why")), topic.use))
            else:
                topic = other
                asked = ask(self._rng.choice(phrasings("and")), self._rng.choice(topic.names))
                exchanges.append(Exchange(asked, short_answer(topic)))
        return exchanges

    def _introduction(self) -> list[Exchange]:
        rng = self._rng
        said = rng.choice(phrasings("introduction")).format(n=rng.choice(words("names")))
        exchanges = [Exchange(said, "Nice to meet you! How can I help you?")]
        if rng.random() < 0.3:
            exchanges.append(self._small_exchange())
        asked = rng.choice(phrasings("own name"))
        exchanges.append(Exchange(asked, "I am too small to remember names."))
        return exchanges
