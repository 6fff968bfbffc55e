"""What an operation of a chat template may cost: guards that refuse, before it is done, what would be too much.

Each takes the render's meter and the arguments of a filter or a method, and raises SecurityError where it would run
long or make too much. Knows no template.
"""

import re
import types
from collections.abc import Callable, Mapping
from typing import Any

from jinja2.exceptions import SecurityError

from serving.validation.render_meter import MAX_INTEGER_BITS, MAX_ITEMS, TOO_LONG, Meter

MAX_SEARCH = 1_000_000_000  # characters compared by a search that takes the product of two lengths
MAX_ATTRIBUTE = 256  # characters of an attribute's dotted path
SLOW_TEXT = {"pprint": 10_000, "urlize": 10_000, "wordwrap": 20_000, "urlencode": 500_000}  # characters, per filter
# Those that take linear time.
TEXT_ENCODINGS = ("utf-8", "utf8", "ascii", "latin-1", "latin1", "iso-8859-1", "unicode-escape", "raw-unicode-escape")
LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_NESTED_KEY = re.compile(r"%\([^()]*\(")
_CONVERSION = re.compile(r"%(?:\([^()]*\))?[#0\- +]*(\*|\d+)?(?:\.(\*|\d+)?)?")


def check_product(meter: Meter, repeated: Any, times: Any) -> None:
    """`repeated * times`."""
    if isinstance(repeated, str | bytes | list | tuple) and isinstance(times, int):
        weight = len(repeated) if isinstance(repeated, str | bytes) else meter.weigh(repeated)
        meter.room(weight * times)
        if isinstance(repeated, list | tuple):
            meter.items(len(repeated) * times)


def check_percent(meter: Meter, form: str | bytes, values: Any) -> None:
    """`form % values`."""
    text = form.decode("latin-1") if isinstance(form, bytes) else form
    widths = [width for match in _CONVERSION.finditer(text) for width in match.groups() if width]
    if "*" in widths or _NESTED_KEY.search(text):
        raise SecurityError("the template formats with a width that is not written out")
    longest = MAX_INTEGER_BITS if isinstance(values, int | float) else MAX_INTEGER_BITS // 3 + meter.weigh(values)
    meter.room(len(text) + text.count("%") * longest + sum(map(int, widths)))


def _check_search(meter: Meter, text: Any, sought: Any = None, *_rest: Any) -> None:
    if isinstance(sought, str | bytes) and len(text) * len(sought) > MAX_SEARCH:
        raise SecurityError("the template searches too long")


def _check_width(meter: Meter, _text: Any, width: int = 80, *_rest: Any) -> None:
    meter.room(width)


def _check_replace(meter: Meter, text: Any, old: Any = "", new: Any = "", *_rest: Any, **_kwargs: Any) -> None:
    text, old, new = (part if isinstance(part, str | bytes) else str(part) for part in (text, old, new))
    meter.room(len(text) + text.count(old) * max(0, len(new) - len(old)))


def _check_tabs(meter: Meter, text: Any, tabsize: int = 8) -> None:
    meter.room(len(text) + text.count("\t" if isinstance(text, str) else b"\t") * tabsize)


def _check_translate(meter: Meter, text: Any, table: Any, *_rest: Any, **_kwargs: Any) -> None:
    values = table.values() if isinstance(table, dict) else ()
    meter.room(len(text) * max((len(value) for value in values if isinstance(value, str)), default=1))


def _check_encoding(meter: Meter, _text: Any, encoding: str = "utf-8", *_rest: Any, **_kwargs: Any) -> None:
    if encoding.lower().replace("_", "-") not in TEXT_ENCODINGS:
        raise SecurityError("the template uses an encoding that is not supported")


def _check_split(meter: Meter, text: Any, sep: Any = None, maxsplit: int = -1) -> None:
    _check_search(meter, text, sep)
    if not 0 <= maxsplit <= MAX_ITEMS and len(text) > MAX_ITEMS:
        meter.items(len(text.split(sep, MAX_ITEMS + 1)))


def _check_lines(meter: Meter, text: Any, *_args: Any, **_kwargs: Any) -> None:
    if len(text) > MAX_ITEMS:
        ends = LINE_ENDS if isinstance(text, str) else (b"\n", b"\r")
        meter.items(sum(text.count(end) for end in ends))


def _joined(meter: Meter, text: Any, items: Any) -> tuple[Any, ...]:
    """Not only checked: what is joined may be drawn once."""
    if isinstance(text, bytes):
        raise SecurityError("bytes are not joined")
    drawn = list(meter.drawn(items))
    meter.room(sum(meter.weigh(item) + len(text) for item in drawn) - len(text))
    return (drawn,)


def _check_to_bytes(meter: Meter, _number: Any, length: int = 1, *_rest: Any, **_kwargs: Any) -> None:
    if length > MAX_INTEGER_BITS:
        raise SecurityError(TOO_LONG)


def _check_indent(meter: Meter, text: Any, width: int | str = 4, *_rest: Any, **_kwargs: Any) -> None:
    lines = 2 + sum(str(text).count(end) for end in LINE_ENDS)
    meter.items(lines)
    meter.room(len(str(text)) + lines * (len(width) if isinstance(width, str) else width))


def _check_count(meter: Meter, _value: Any, count: int, *_rest: Any, **_kwargs: Any) -> None:
    meter.items(count)


def _check_precision(meter: Meter, _value: Any, precision: int = 0, *_rest: Any, **_kwargs: Any) -> None:
    if abs(precision) > MAX_INTEGER_BITS // 4:
        raise SecurityError("the template computes too large a number")


def _check_list(meter: Meter, value: Any) -> None:
    if isinstance(value, str | bytes):
        meter.items(len(value))


def _check_tags(meter: Meter, value: Any) -> None:
    text = str(value)
    if len(text) * text.count("<") > MAX_SEARCH:
        raise SecurityError("the template searches too long")


def check_attributes(meter: Meter, _value: Any, *args: Any, **kwargs: Any) -> None:
    """A filter that takes the dotted path of an attribute."""
    if any(isinstance(name, str) and len(name) > MAX_ATTRIBUTE for name in (*args[:3], kwargs.get("attribute"))):
        raise SecurityError("the template names too long an attribute")


def _check_mapped(meter: Meter, _value: Any, *args: Any, **kwargs: Any) -> None:
    check_attributes(meter, None, *args[:1], **kwargs)


def _check_slow(most: int) -> Callable[..., None]:
    def check(meter: Meter, value: Any, *args: Any, **kwargs: Any) -> None:
        if any(meter.weigh(item) > most for item in (value, *args, *kwargs.values())):
            raise SecurityError(TOO_LONG)

    return check


def _check_ends(meter: Meter, text: Any, chars: Any = None) -> None:
    _check_search(meter, str(text) if not isinstance(text, bytes) else text, chars)


def _check_filtered_percent(meter: Meter, value: Any, *args: Any, **kwargs: Any) -> None:
    check_percent(meter, str(value), kwargs or args)


def _check_filtered_text(meter: Meter, value: Any, *_args: Any, **_kwargs: Any) -> None:
    meter.items(len(str(value)) // 8)  # about as many words


METHODS: Mapping[str, Callable[..., Any]] = types.MappingProxyType(
    {
        **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _check_width),
        **dict.fromkeys(("rfind", "rindex", "rpartition"), _check_search),
        **dict.fromkeys(("strip", "lstrip", "rstrip"), _check_ends),
        **dict.fromkeys(("split", "rsplit"), _check_split),
        **dict.fromkeys(("encode", "decode"), _check_encoding),
        "replace": _check_replace,
        "expandtabs": _check_tabs,
        "translate": _check_translate,
        "splitlines": _check_lines,
        "join": _joined,
        "to_bytes": _check_to_bytes,
    }
)
FILTERS: Mapping[str, Callable[..., None]] = types.MappingProxyType(
    {
        **{name: _check_slow(most) for name, most in SLOW_TEXT.items()},
        **dict.fromkeys(("sort", "unique", "min", "max", "groupby"), check_attributes),
        **dict.fromkeys(("map", "select", "reject", "selectattr", "rejectattr"), _check_mapped),
        **dict.fromkeys(("batch", "slice"), _check_count),
        "center": _check_width,
        "replace": _check_replace,
        "format": _check_filtered_percent,
        "indent": _check_indent,
        "round": _check_precision,
        "list": _check_list,
        "striptags": _check_tags,
        "title": _check_filtered_text,
        "trim": _check_ends,
        "xmlattr": _check_slow(100_000),
    }
)
