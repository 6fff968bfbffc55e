"""The sandbox that chat templates run in: jinja2's immutable one, with bounds on time and memory.

Knows no message and no model. A template is code that comes with a model, and what it works on comes from clients: any
of the two may be hostile. jinja2's sandbox keeps a template from reaching Python, but not from asking C for a text of
gigabytes, which nothing can interrupt. So every operation that may grow or run long passes a `Meter`: it is refused
before it is done if its result could be too large, and what it made is charged to the render's budget.
"""

import datetime
import functools
import itertools
import json
import re
import sys
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils
import jinja2.visitor
from jinja2.exceptions import SecurityError, TemplateAssertionError

MAX_SOURCE = 200_000  # characters; the longest public templates have a tenth
MAX_ITEMS = 250_000  # of one list or dict
MAX_BYTES = 64_000_000  # of all that one render makes
MAX_INTEGER_BITS = 1024
MAX_SEARCH = 1_000_000_000  # characters compared by a search that takes the product of two lengths
MAX_ATTRIBUTE = 256  # characters of an attribute's dotted path
MAX_FORMAT = 256  # characters of a date's format
SLOW_TEXT = {"pprint": 10_000, "urlize": 10_000, "wordwrap": 20_000, "urlencode": 500_000}  # characters, per filter
LARGEST_INDENT = 64  # characters of JSON's indentation and separators
# Those that take linear time.
TEXT_ENCODINGS = ("utf-8", "utf8", "ascii", "latin-1", "latin1", "iso-8859-1", "unicode-escape", "raw-unicode-escape")
LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"

VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))
CONTAINERS = (list, tuple, dict, *VIEWS)

# The sandbox's own filters, under names that no template can write.
METERED, MEASURED, TICKED, CONCATENATED = "metered loop", "measured", "ticked", "concatenated"

COMPILERS_ARGUMENTS = ("_loop_vars", "_block_vars")  # what compiled templates add to every call

TOO_LONG = "the template makes too long a text"
TOO_MUCH = "the template uses too much memory"
_NESTED_KEY = re.compile(r"%\([^()]*\(")
_CONVERSION = re.compile(r"%(?:\([^()]*\))?[#0\- +]*(\*|\d+)?(?:\.(\*|\d+)?)?")


class Meter:
    """What one render may still use.

    Args:
        time_limit_s: from now.
        max_characters: of one value; of a list or dict with all that is in it, as often as it is in it.
    """

    __slots__ = ("_bytes", "_deadline", "_weights", "max_characters")

    def __init__(self, time_limit_s: float, max_characters: int) -> None:
        self.max_characters = max_characters
        self._deadline = time.monotonic() + time_limit_s
        self._bytes = MAX_BYTES
        self._weights: dict[int, tuple[Any, int]] = {}  # by id; the container is held, so that its id stays its own

    def tick(self) -> None:
        """Look at the clock."""
        if time.monotonic() > self._deadline:
            raise SecurityError("the template takes too long")

    def room(self, characters: int) -> None:
        """Refuse what would be longer than a value may be."""
        if characters > self.max_characters:
            raise SecurityError(TOO_LONG)

    def items(self, count: int) -> None:
        """Refuse what would have more items than a container may have."""
        if count > MAX_ITEMS:
            raise SecurityError("the template makes too long a list")

    def measure(self, value: Any) -> Any:
        """Charge a new value and return it, unless it is too large to go on with."""
        if isinstance(value, (str, bytes)):
            if len(value) > self.max_characters:
                raise SecurityError(TOO_LONG)
            self._bytes -= sys.getsizeof(value)
            if self._bytes < 0:
                raise SecurityError(TOO_MUCH)
        elif isinstance(value, int):
            if value.bit_length() > MAX_INTEGER_BITS:
                raise SecurityError("the template computes too large a number")
        elif isinstance(value, CONTAINERS):
            self.weigh(value)
        elif isinstance(value, types.GeneratorType):
            return self.drawn(value)
        return value

    def weigh(self, value: Any) -> int:
        """The characters and items of a value, written out."""
        if isinstance(value, (str, bytes)):
            return len(value) + 1
        if isinstance(value, CONTAINERS):
            known = self._weights.get(id(value))
            return self._weighed(value) if known is None else known[1]
        return 1

    def know(self, container: Any, weight: int) -> None:
        """Take a new container of known weight."""
        if weight > self.max_characters:
            raise SecurityError(TOO_LONG)
        self._charge(sys.getsizeof(container))
        self._weights[id(container)] = container, weight

    def ticking(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items of a loop, with a look at the clock before each."""
        for item in items:
            self.tick()
            yield item

    def drawn(self, items: Iterable[Any]) -> Iterator[Any]:
        """The same for what a filter makes one by one: each is measured."""
        for count, item in enumerate(items):
            self.tick()
            self.items(count)
            yield self.measure(item)

    def texts(self, items: Iterable[Any], separator: str) -> list[str]:
        """The texts of items that are to be joined."""
        texts: list[str] = []
        length = 0
        for item in self.drawn(items):
            texts.append(item if isinstance(item, str) else self.measure(str(item)))
            length += len(texts[-1]) + len(separator)
            self.room(length - len(separator))
        return texts

    def _weighed(self, container: Any) -> int:
        self.items(len(container))
        weight, size = 1, sys.getsizeof(container)
        for item in itertools.chain.from_iterable(container.items()) if isinstance(container, dict) else container:
            if isinstance(item, (str, bytes)):
                weight += len(item) + 1
                size += sys.getsizeof(item)
            else:
                weight += self.weigh(item)
            if weight > self.max_characters:
                raise SecurityError(TOO_LONG)
        self._charge(size)
        self._weights[id(container)] = container, weight
        return weight

    def _charge(self, size: int) -> None:
        self._bytes -= size
        if self._bytes < 0:
            raise SecurityError(TOO_MUCH)


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The environment of one template, with transformers' additions to the language; any thread may render.

    Args:
        max_characters: of a value, at most.
    """

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self, max_characters: int) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # constant folding would compute before any clock runs
            finalize=self._shown,
            extensions=[jinja2.ext.loopcontrols, _GenerationTag],
        )
        self._max_characters = max_characters
        self._running = threading.local()
        self.concat = self._concat  # type: ignore[method-assign]  # what joins the pieces of a macro or a captured block
        self.filters["tojson"] = self._tojson
        self.filters["join"] = self._join
        self.filters["sum"] = self._sum
        self.filters["wordcount"] = lambda text: sum(1 for _ in self.meter.ticking(re.finditer(r"\w+", str(text))))
        self.filters = {name: self._guarded(name, made) for name, made in self.filters.items()}
        self.filters[METERED] = lambda items: self.meter.ticking(items)
        self.filters[MEASURED] = lambda value: self.meter.measure(value)
        self.filters[TICKED] = self._ticked
        self.filters[CONCATENATED] = self._concatenated
        for name in ("==", "eq", "equalto", "!=", "ne", "<", "lt", "<=", "le", ">", "gt", ">=", "ge", "in"):
            compare: Any = self.tests[name]
            self.tests[name] = self._ticking(compare)
        del self.globals["lipsum"]
        self.globals.update(
            dict=_DictMaker(self), namespace=_Namespace, raise_exception=_raise_exception, strftime_now=_strftime_now
        )

    @property
    def meter(self) -> Meter:
        """Of the render that this thread is in; without one, an AttributeError: nothing is computed to compile."""
        meter: Meter = self._running.meter
        return meter

    @contextmanager
    def metered(self, meter: Meter) -> Iterator[None]:
        """Render within these bounds, in this thread."""
        self._running.meter = meter
        try:
            yield
        finally:
            del self._running.meter

    def compile_bounded(self, source: str) -> jinja2.Template:
        """Compile a template so that what it does is metered.

        Raises:
            jinja2.TemplateError: the template is wrong, too long, or uses what cannot be bounded.
            SyntaxError, RecursionError, MemoryError, ValueError: Python cannot compile what it says.
        """
        if len(source) > MAX_SOURCE:
            raise TemplateAssertionError(f"it has more than {MAX_SOURCE} characters", 1)
        tree = _Metering().visit(self.parse(source))
        tree.set_environment(self)
        return jinja2.Template.from_code(self, self.compile(tree), self.make_globals(None))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """As the immutable sandbox; besides, nothing that makes a dict of a text, or a proxy of no weight of a dict."""
        return super().is_safe_attribute(obj, attr, value) and not (
            (attr == "mapping" and isinstance(obj, VIEWS))
            or (attr == "maketrans" and isinstance(obj, str | bytes))
            or (attr == "fromkeys" and isinstance(obj, dict))
        )

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - jinja2's own
        """Call what a template calls, a method of a text only if its result will fit."""
        meter = __self.meter
        meter.tick()
        given = {name: value for name, value in kwargs.items() if name not in COMPILERS_ARGUMENTS} if kwargs else kwargs
        for arg in (*args, *given.values()):
            if isinstance(arg, CONTAINERS):
                meter.measure(args)  # a macro sees them as one tuple and one dict
                meter.measure(given)
                break
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, (str, bytes, int)):
            guard = METHODS.get(__obj.__name__)
            if guard is not None:
                args = guard(meter, owner, *args, **given) or args
        elif isinstance(__obj, jinja2.runtime.LoopContext) and args:
            args = (meter.ticking(args[0]), *args[1:])
        return meter.measure(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Compute what is sure to fit."""
        return self._computed(operator, left, right)

    def _computed(self, operator: str, left: Any, right: Any) -> Any:
        meter = self.meter
        meter.tick()
        if operator == "+" and isinstance(left, str):
            return meter.measure(left + right)
        if isinstance(left, int) and isinstance(right, int):
            meter.measure(left)
            meter.measure(right)
            if operator == "**" and left.bit_length() * right > MAX_INTEGER_BITS:
                raise SecurityError("the template computes too large a number")
        elif operator == "*":
            _check_product(meter, left, right)
            _check_product(meter, right, left)
        elif operator == "%" and isinstance(left, str | bytes):
            _check_percent(meter, left, right)
        elif operator == "+" and isinstance(left, list | tuple) and isinstance(right, list | tuple):
            meter.items(len(left) + len(right))
            result = self.binop_table[operator](left, right)
            meter.know(result, meter.weigh(left) + meter.weigh(right))
            return result
        return meter.measure(self.binop_table[operator](left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """A text's `format` within bounds, `None` for anything else."""
        original = super().wrap_str_format(value)
        if original is None:
            return None
        text: str = value.__self__
        if type(text) is not str:
            raise SecurityError("`format` of a marked text is not supported")

        @functools.wraps(original)
        def bounded(*args: Any, **kwargs: Any) -> str:
            if value.__name__ == "format_map":
                (mapping,) = args
                args, kwargs = (), mapping
            return _Formatter(self).vformat(text, args, kwargs)

        return bounded

    def _shown(self, value: Any) -> Any:
        """The text that stands for a value in the output; measured, since a captured output is kept."""
        if isinstance(value, str):
            return value
        meter: Meter | None = getattr(self._running, "meter", None)
        return str(value) if meter is None else meter.measure(str(value))

    def _ticked(self, value: Any) -> Any:
        self.meter.tick()
        return value

    def _ticking(self, test: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(test)
        def ticking(*args: Any) -> Any:
            self.meter.tick()
            return test(*args)

        return ticking

    def _concat(self, pieces: Iterable[str]) -> str:
        pieces = list(pieces)
        meter = self.meter
        meter.room(sum(map(len, pieces)))
        joined: str = meter.measure("".join(pieces))
        return joined

    def _concatenated(self, values: Sequence[Any]) -> str:
        return self._concat([self._shown(value) for value in values])

    def _guarded(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """The filter with a look at the clock and its guard before it, its result measured."""
        first = 1 if hasattr(original, "jinja_pass_arg") else 0  # where the filtered value stands
        guard = FILTERS.get(name)

        @functools.wraps(original)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            meter = self.meter
            meter.tick()
            if guard is not None:
                guard(meter, *args[first:], **kwargs)
            return meter.measure(original(*args, **kwargs))

        return guarded

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """As transformers' filter: jinja2's own would escape `<`, `>`, `&` and `'` for HTML."""
        for given in (indent, *(separators or ())):
            if (given if isinstance(given, int) else len(given or "")) > LARGEST_INDENT:
                raise SecurityError("the template writes JSON with too much space")
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        if indent is None and separators is None:
            return encoder.encode(value)
        return "".join(self.meter.texts(encoder.iterencode(value), ""))

    def _join(self, value: Any, d: str = "", attribute: str | int | None = None) -> str:
        items = value if attribute is None else map(self._getter(attribute), value)
        return str(d).join(self.meter.texts(items, str(d)))

    def _sum(self, value: Any, attribute: str | int | None = None, start: Any = 0) -> Any:
        if isinstance(start, str | bytes):
            raise TypeError("sum() can't sum strings")
        total = start
        for item in value if attribute is None else map(self._getter(attribute), value):
            total = self._computed("+", total, item)
        return total

    def _getter(self, attribute: str | int) -> Callable[[Any], Any]:
        _check_attributes(self.meter, None, attribute)
        return jinja2.filters.make_attrgetter(self, attribute)


class _Metering(jinja2.visitor.NodeTransformer):
    """Puts the sandbox's own filters around what grows or runs long."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:  # noqa: N802 - the visitor's naming
        self.generic_visit(node)
        node.iter = _filtered(node.iter, METERED)
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(jinja2.nodes.List(node.nodes), CONCATENATED)

    def visit_List(self, node: jinja2.nodes.List) -> jinja2.nodes.Node:  # noqa: N802
        return self._literal(node)

    def visit_Dict(self, node: jinja2.nodes.Dict) -> jinja2.nodes.Node:  # noqa: N802
        return self._literal(node)

    def visit_Tuple(self, node: jinja2.nodes.Tuple) -> jinja2.nodes.Node:  # noqa: N802
        return self._literal(node) if node.ctx == "load" else node

    def visit_Compare(self, node: jinja2.nodes.Compare) -> jinja2.nodes.Node:  # noqa: N802
        quick = all(_is_constant(operand.expr) for operand in node.ops)
        self.generic_visit(node)
        return node if quick else _filtered(node, TICKED)

    def visit_ScopedEvalContextModifier(self, node: jinja2.nodes.Node) -> jinja2.nodes.Node:  # noqa: N802
        raise TemplateAssertionError("automatic escaping is not supported", node.lineno)

    def _literal(self, node: jinja2.nodes.Expr) -> jinja2.nodes.Node:
        if _is_constant(node):
            return node
        self.generic_visit(node)
        return _filtered(node, MEASURED)


def _is_constant(node: jinja2.nodes.Node) -> bool:
    constant = (jinja2.nodes.Const, jinja2.nodes.List, jinja2.nodes.Tuple, jinja2.nodes.Dict, jinja2.nodes.Pair)
    return isinstance(node, constant) and all(map(_is_constant, node.iter_child_nodes()))


def _filtered(node: jinja2.nodes.Node, name: str) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 - as the parent has it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """A namespace that keeps what it holds to itself: written out it may be endless, or Python's own attributes."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *given = args
        attributes = dict(*given, **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"the name {str(name)[:100]!r} in a namespace begins with an underscore")


class _DictMaker:
    """`dict` for templates; the type itself would give them its methods that change a dict."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        """A dict with these keys."""
        return dict.fromkeys(self._sandbox.meter.drawn(keys), value)


class _Formatter(jinja2.sandbox.SandboxedFormatter):
    """The sandbox's `str.format` with bounds."""

    def __init__(self, sandbox: Sandbox) -> None:
        super().__init__(sandbox)
        self._sandbox = sandbox
        self._length = 0

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        self._sandbox.meter.tick()
        return super().get_field(field_name, args, kwargs)

    def format_field(self, value: Any, format_spec: str) -> str:
        meter = self._sandbox.meter
        meter.room(sum(map(int, re.findall(r"\d+", format_spec))))
        text: str = meter.measure(super().format_field(value, format_spec))
        self._length += len(text)
        meter.room(self._length)
        return text


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(format: str) -> str:  # noqa: A002 - the templates' own word
    if len(format) > MAX_FORMAT:  # the C library's text has at most 256 times the length
        raise SecurityError("the template formats a date too long")
    return datetime.datetime.now().strftime(format)


# Guards: each takes the arguments of a filter or method and refuses those that would run long or make too much.


def _check_product(meter: Meter, repeated: Any, times: Any) -> None:
    if isinstance(repeated, str | bytes | list | tuple) and isinstance(times, int):
        weight = len(repeated) if isinstance(repeated, str | bytes) else meter.weigh(repeated)
        meter.room(weight * times)
        if isinstance(repeated, list | tuple):
            meter.items(len(repeated) * times)


def _check_percent(meter: Meter, form: str | bytes, values: Any) -> None:
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


def _check_attributes(meter: Meter, _value: Any, *args: Any, **kwargs: Any) -> None:
    if any(isinstance(name, str) and len(name) > MAX_ATTRIBUTE for name in (*args[:3], kwargs.get("attribute"))):
        raise SecurityError("the template names too long an attribute")


def _check_mapped(meter: Meter, _value: Any, *args: Any, **kwargs: Any) -> None:
    _check_attributes(meter, None, *args[:1], **kwargs)


def _check_slow(most: int) -> Callable[..., None]:
    def check(meter: Meter, value: Any, *args: Any, **kwargs: Any) -> None:
        if any(meter.weigh(item) > most for item in (value, *args, *kwargs.values())):
            raise SecurityError(TOO_LONG)

    return check


def _check_ends(meter: Meter, text: Any, chars: Any = None) -> None:
    _check_search(meter, str(text) if not isinstance(text, bytes) else text, chars)


def _check_filtered_percent(meter: Meter, value: Any, *args: Any, **kwargs: Any) -> None:
    _check_percent(meter, str(value), kwargs or args)


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
        **dict.fromkeys(("sort", "unique", "min", "max", "groupby"), _check_attributes),
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
