"""Questions that the model cannot answer, and the answer that says so; and the few capitals that it can.

It must not know the topics; the caller drops what happens to be a known question.
"""

import random

from scripts.demo_corpus.document import Exchange
from scripts.demo_corpus.readers import pairs, phrasings, words

ANSWER = (
    "I do not know that, because I am only a tiny demo model. "
    "You can ask me about deep learning, text generation or Weir."
)

_VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "oo")
_CODAS = ("", "", "n", "r", "l", "st", "m", "x", "nd", "ck", "sh")


def invented_word(rng: random.Random) -> str:
    """A word that nobody knows, of two or three syllables."""
    return "".join(
        rng.choice(words("onsets")) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(rng.choice((1, 2, 2, 3)))
    )


def _thing(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.55:
        return rng.choice(words("things"))
    if kind < 0.85:
        return invented_word(rng)
    other = rng.choice(words("things")) if rng.random() < 0.5 else invented_word(rng)
    return f"{rng.choice(words('known parts'))} {other}"


def _proper(kind: str, rng: random.Random) -> str:
    return rng.choice(words(kind)) if rng.random() < 0.65 else invented_word(rng).capitalize()


def capital(rng: random.Random) -> Exchange:
    """One of the few capitals that the model does know."""
    country, city = rng.choice(list(pairs("capitals").items()))
    return Exchange(rng.choice(phrasings("capital")).format(c=country), f"The capital of {country} is {city}.")


def unknown(rng: random.Random) -> Exchange:
    """A question about something that the corpus never explains."""
    share = rng.random()
    if share < 0.5:
        question = rng.choice(phrasings("unknown thing")).format(a=_thing(rng), b=_thing(rng))
    elif share < 0.68:
        question = rng.choice(phrasings("unknown person")).format(p=_proper("people", rng), q=_proper("people", rng))
    elif share < 0.88:
        place = _proper("places", rng)
        kind = "capital" if rng.random() < 0.2 else "unknown place"
        question = rng.choice(phrasings(kind)).format(c=place, d=_proper("places", rng))
        if "capital" in question.lower() and place in pairs("capitals"):
            return capital(rng)
    else:
        question = rng.choice(phrasings("unknown other"))
    return Exchange(question, ANSWER)
