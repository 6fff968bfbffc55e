"""The sandbox that chat templates run in: jinja2's immutable one, with bounds on time and memory.

Knows no message and no model. A template is code that comes with a model, and what it works on comes from clients: any
of the two may be hostile. jinja2's sandbox keeps a template from reaching Python, but not from asking C for a text of
gigabytes, which nothing can interrupt. So every operation that may grow or run long passes a `Meter`: it is refused
before it is done if its result could be too large, and what it made is charged to the render's budget.
"""

import datetime
import functools
import json
import re
import threading
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

from serving.validation.render_meter import CONTAINERS, MAX_INTEGER_BITS, VIEWS, Meter
from serving.validation.template_guards import FILTERS, METHODS, check_attributes, check_percent, check_product

MAX_SOURCE = 200_000  # characters; the longest public templates have a tenth
MAX_FORMAT = 256  # characters of a date's format
LARGEST_INDENT = 64  # characters of JSON's indentation and separators

# The sandbox's own filters, under names that no template can write.
METERED, MEASURED, TICKED, CONCATENATED = "metered loop", "measured", "ticked", "concatenated"

COMPILERS_ARGUMENTS = ("_loop_vars", "_block_vars")  # what compiled templates add to every call


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
            check_product(meter, left, right)
            check_product(meter, right, left)
        elif operator == "%" and isinstance(left, str | bytes):
            check_percent(meter, left, right)
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
        check_attributes(self.meter, None, attribute)
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
