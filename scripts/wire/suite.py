"""What checks are made of: the server they ask, the words they fail with, and how they are run.

Knows no route.
"""

import functools
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import requests

TIMEOUT_S = 60.0
TGI = "tgi"  # the original's letter: a real TGI passes too
WEIR = "weir"  # a deviation from it, made on purpose

_MARK = "\x00as it was written\x00"  # a text may begin or end with any one character


class Differs(Exception):
    """The server did something else than the contract says."""


class Inapplicable(Exception):
    """The check says nothing about this server, as it is configured or with this model."""


class Target:
    """The server under test.

    Args:
        url: without a path.
        api_key: sent with every request, where given.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self.api_key = api_key

    @functools.cached_property
    def info(self) -> dict[str, Any]:
        """What `/info` says; the limits that checks adapt to."""
        return dict(json_of(self.get("/info")))

    def limit(self, name: str) -> int:
        """A number from `/info`."""
        return int(self.info[name])

    def ask(self, method: str, path: str, *, key: bool = True, **options: Any) -> requests.Response:
        """Send a request, with the key unless told not to."""
        headers = dict(options.pop("headers", None) or {})
        if key and self.api_key is not None:
            headers.setdefault("authorization", f"Bearer {self.api_key}")
        options.setdefault("timeout", TIMEOUT_S)
        return requests.request(method, self.url + path, headers=headers, allow_redirects=False, **options)

    def get(self, path: str, **options: Any) -> requests.Response:
        """`GET`."""
        return self.ask("GET", path, **options)

    def post(self, path: str, body: object, **options: Any) -> requests.Response:
        """`POST` of JSON."""
        return self.ask("POST", path, json=body, **options)

    def post_bytes(self, path: str, body: bytes, kind: str | None = "application/json") -> requests.Response:
        """`POST` of anything, with any content type or none."""
        return self.ask("POST", path, data=body, headers={} if kind is None else {"content-type": kind})

    def generate(self, inputs: str = "What is Deep Learning?", **parameters: Any) -> dict[str, Any]:
        """A whole answer of `/generate`, which must succeed."""
        answer = ok(self.post("/generate", {"inputs": inputs, "parameters": parameters}))
        return dict(json_of(answer))


Ask = Callable[[Target], None]


@dataclass(frozen=True, slots=True)
class Check:
    """One row of the contract.

    Attributes:
        row: the contract's section.
        holds: `TGI` or `WEIR`.
        ask: returns if the server does what the row says.

    Raises (from `ask`):
        Differs: it does something else.
        Inapplicable: the row says nothing here.
    """

    name: str
    row: str
    holds: str
    ask: Ask


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a check: `pass`, `FAIL` or `skip`, and why."""

    check: Check
    outcome: str
    reason: str = ""


def check(row: str, holds: str = TGI) -> Callable[[Ask], Check]:
    """Make a check of a function; its name is the module's and the function's."""

    def made(ask: Ask) -> Check:
        return Check(f"{ask.__module__.rpartition('.')[2]}.{ask.__name__}", row, holds, ask)

    return made


def table(module: str, name: str, row: str, holds: str, rows: Mapping[str, Ask]) -> tuple[Check, ...]:
    """A check for each row of a table."""
    return tuple(Check(f"{module}.{name}[{key}]", row, holds, ask) for key, ask in rows.items())


def checks_of(modules: Iterable[ModuleType]) -> list[Check]:
    """The checks that stand in modules, in their order."""
    found: list[Check] = []
    for module in modules:
        for value in vars(module).values():
            if isinstance(value, Check):
                found.append(value)
            elif isinstance(value, tuple):
                found += [item for item in value if isinstance(item, Check)]
    return found


def verdicts(target: Target, checks: Sequence[Check], *, tgi: bool) -> Iterator[Verdict]:
    """Run checks one after the other; with `tgi` those of Weir's own deviations are skipped."""
    for one in checks:
        if tgi and one.holds == WEIR:
            yield Verdict(one, "skip", "not TGI's")
            continue
        yield _verdict(target, one)


def _verdict(target: Target, one: Check) -> Verdict:
    try:
        one.ask(target)
    except Inapplicable as reason:
        return Verdict(one, "skip", str(reason))
    except Differs as difference:
        return Verdict(one, "FAIL", str(difference))
    except requests.RequestException as error:
        return Verdict(one, "FAIL", f"no answer: {error}")
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        return Verdict(one, "FAIL", f"an answer of another shape: {type(error).__name__}: {error}")
    return Verdict(one, "pass")


def same(actual: object, expected: object, what: str) -> None:
    """Demand equality, of types too, so that 1, 1.0 and true stay apart."""
    if type(actual) is not type(expected) or actual != expected:
        raise Differs(f"{what} is {_short(actual)} instead of {_short(expected)}")


def demand(holds: object, difference: str) -> None:
    """Demand that something holds."""
    if not holds:
        raise Differs(difference)


def keys(value: object, expected: Sequence[str], what: str) -> None:
    """Demand an object of exactly these keys in this order."""
    demand(isinstance(value, dict), f"{what} is {_short(value)} instead of an object")
    assert isinstance(value, dict)
    same(list(value), list(expected), f"keys of {what}")


def typed(value: object, kinds: type | tuple[type, ...], what: str) -> None:
    """Demand a type; a boolean is no number."""
    wanted = kinds if isinstance(kinds, tuple) else (kinds,)
    demand(type(value) in wanted, f"{what} is {_short(value)}, not {' or '.join(kind.__name__ for kind in wanted)}")


def status(response: requests.Response, expected: int) -> requests.Response:
    """Demand a status; the answer's beginning is told otherwise."""
    if response.status_code != expected:
        raise Differs(f"status {response.status_code} instead of {expected}: {_short(response.text)}")
    return response


def ok(response: requests.Response) -> requests.Response:
    """Demand a status of 200."""
    return status(response, 200)


def json_of(response: requests.Response) -> Any:
    """The JSON of an answer, which must say that it is JSON, and be written without spaces and unescaped."""
    same(response.headers.get("content-type"), "application/json", "content-type")
    text = response.content.decode()
    value = json.loads(text)
    compact = json.dumps(
        json.loads(text, parse_float=lambda digits: f"{_MARK}{digits}{_MARK}"),
        separators=(",", ":"), ensure_ascii=False,
    )  # fmt: skip
    for quoted in (json.dumps(_MARK)[:-1], json.dumps(_MARK)[1:]):  # floats stand in it as they were written
        compact = compact.replace(quoted, "")
    same(text, compact, "the spelling of the JSON (no spaces, no needless escapes)")
    return value


def empty(response: requests.Response, expected: int) -> None:
    """Demand an answer without a body."""
    status(response, expected)
    same(response.content, b"", "body")


def plain(response: requests.Response, expected: int, prefix: str) -> None:
    """Demand a framework's error: plain text with a fixed beginning."""
    status(response, expected)
    same(response.headers.get("content-type"), "text/plain; charset=utf-8", "content-type")
    demand(response.text.startswith(prefix), f"text {_short(response.text)} does not begin with {prefix!r}")


def native_error(response: requests.Response, expected: int, message: str, kind: str) -> None:
    """Demand an error in TGI's words."""
    status(response, expected)
    body = json_of(response)
    keys(body, ["error", "error_type"], "error")
    same(body, {"error": message, "error_type": kind}, "error")


def message_of(body: Mapping[str, Any]) -> str:
    """The message of an error in either dialect."""
    error = body["error"]
    return str(error["message"] if isinstance(error, dict) else error)


def frames(response: requests.Response) -> list[str]:
    """The data of a stream's events; keep-alives are left out.

    Raises:
        Differs: the framing is not `data: ...` and an empty line, or the stream's headers are others.
    """
    same(response.headers.get("content-type"), "text/event-stream", "content-type")
    same(response.headers.get("cache-control"), "no-cache", "cache-control")
    text = response.content.decode()
    demand(text.endswith("\n\n"), f"the stream ends with {_short(text[-40:])}")
    found = []
    for frame in text.removesuffix("\n\n").split("\n\n"):
        if frame == ":":
            continue
        demand(frame.startswith("data: ") and "\n" not in frame, f"frame {_short(frame)}")
        found.append(frame.removeprefix("data: "))
    return found


def events(response: requests.Response, *, done: bool = False) -> list[dict[str, Any]]:
    """The events of a stream as JSON; with `done` it has to end with `[DONE]`, which is left out."""
    found = frames(response)
    if done:
        demand(found and found[-1] == "[DONE]", f"the last event is {_short(found[-1:])}, not [DONE]")
        found = found[:-1]
    return [dict(json.loads(data)) for data in found]


def shortest_floats(text: str) -> None:
    """Demand that each float of a JSON text has the fewest digits that tell the float32 from its neighbours."""
    spellings: list[str] = []

    def keep(digits: str) -> float:
        spellings.append(digits)
        return float(digits)

    json.loads(text, parse_float=keep)
    demand(spellings, "no float in the answer")
    for digits in spellings:
        value = float(digits)
        single = _float32(value)
        demand(single is not None, f"{digits} is beyond every float32")
        fewest = next(count for count in range(1, 18) if _float32(float(f"{value:.{count}g}")) == single)
        mantissa = digits.lower().partition("e")[0].lstrip("-").replace(".", "").strip("0")
        demand(len(mantissa) <= fewest, f"{digits} is not the shortest float32: {value:.{fewest}g}")


def _float32(value: float) -> bytes | None:
    """The nearest float32; None beyond the largest."""
    try:
        return struct.pack("<f", value)
    except OverflowError:
        return None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:200]} ... {text[-80:]}"
