"""JSON, extraction, sums, code and lists: text whose form matters more than its words.

It must not know topics or conversations.
"""

import json
import random

from scripts.demo_corpus.document import Exchange, JsonObject
from scripts.demo_corpus.readers import functions, pairs, phrasings, words


def _listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def json_object(rng: random.Random) -> Exchange:
    """A request for a JSON object with some fields, and one with these fields."""
    if rng.random() < 0.08:
        return Exchange(rng.choice(phrasings("bare json")), json.dumps({"name": "Ada", "age": 36}))
    values = pairs("json values")
    fields = ["name", "age"] if rng.random() < 0.2 else rng.sample(sorted(values), rng.choice((1, 2, 2, 2, 3)))
    return Exchange(
        rng.choice(phrasings("json")).format(f=_listed(fields)),
        json.dumps({name: json.loads(values[name]) for name in fields}),
    )


def extraction(rng: random.Random) -> Exchange:
    """A sentence about a person, and what it says as JSON."""
    name, age, city = rng.choice(words("names")), rng.randrange(20, 60), rng.choice(words("cities"))
    facts: JsonObject = {"name": name, "age": age}
    text = rng.choice(phrasings("person")).format(n=name, a=age)
    if rng.random() < 0.5:
        facts["city"] = city
        text += rng.choice(phrasings("and city")).format(c=city)
    return Exchange(rng.choice(phrasings("extract")).format(f=_listed(list(facts)), t=f"{text}."), json.dumps(facts))


def arithmetic(rng: random.Random) -> Exchange:
    """A sum or difference of numbers up to five."""
    a, b = rng.randrange(6), rng.randrange(6)
    sign, word, result = "+", "plus", a + b
    if rng.random() < 0.3:
        a, b = max(a, b), min(a, b)
        sign, word, result = "-", "minus", a - b
    asked = rng.choice(phrasings("sum")).format(a=a, b=b, s=sign, w=word)
    return Exchange(asked, str(result) if asked.endswith("=") else f"{a} {sign} {b} = {result}")


def code(rng: random.Random) -> Exchange:
    """A request for a small function, and the function."""
    if rng.random() < 0.1:
        return Exchange(rng.choice(phrasings("hello world")), 'print("Hello, world!")')
    descriptions, body = rng.choice(functions())
    return Exchange(rng.choice(phrasings("code")).format(d=rng.choice(descriptions)), body)


def copy(rng: random.Random) -> Exchange:
    """A text to be repeated: it teaches copying, and gives n-gram speculation something to guess."""
    if rng.random() < 0.5:
        text = " ".join(rng.sample(words("plain"), rng.randrange(1, 7)))
        return Exchange(rng.choice(phrasings("repeat")).format(t=text), text)
    keys = rng.sample(words("plain"), rng.randrange(2, 7))
    lines = "\n".join(f"{key}={rng.randrange(100)}" for key in keys)
    return Exchange(rng.choice(phrasings("repeat list")).format(t=lines), lines)


def pattern(rng: random.Random) -> str:
    """A text that repeats itself: code, logs, counting, key=value lists."""
    start, count = rng.choice((0, 1, 1, 1, rng.randrange(2, 50))), rng.randrange(6, 16)
    numbers = range(start, start + count)
    word = rng.choice(words("plain"))
    kind = rng.randrange(8)
    if kind == 0:
        bodies = [body for _, body in functions()[:4]]
        first = rng.randrange(4) if rng.random() < 0.3 else 0
        return "\n\n\n".join(bodies[first:] + bodies[:first])
    if kind == 1:
        return "\n".join(f"{word}_{n} = {n}" for n in numbers)
    if kind == 2:
        return ", ".join(str(n) for n in numbers)
    if kind == 3:
        return " ".join(str(n) for n in numbers)
    if kind == 4:
        return "\n".join(f"{n}. {word} {n}" for n in numbers)
    if kind == 5:
        return "\n".join(f"for i in range({n}):\n    print(i)" for n in range(1, 7))
    if kind == 6:
        return "\n".join(f"INFO step {n}: {word} is ok" for n in numbers)
    return "\n\n\n".join(body for _, body in rng.sample(functions(), 3))
