"""The headers of answers: what an answer cost, and how names are written.

Knows no dialect.
"""

from collections.abc import Callable, Iterable
from typing import Any

from serving.api.generation import Timings
from serving.validation.validator import Validated

CUT = "x-response-cut"  # why an answer is not as long as it might have been; only where that is not its length


def timing_headers(compute_type: str, validated: Validated, timings: Timings) -> dict[str, str]:
    """Of a whole answer; times are in milliseconds except `x-compute-time`."""
    cut = {CUT: "deadline"} if timings.cut else {}
    return {
        "x-compute-type": compute_type,
        "x-compute-time": f"{timings.total_s:.6f}",
        "x-compute-characters": str(validated.characters),
        "x-total-time": _ms(timings.total_s),
        "x-validation-time": _ms(timings.validation_s),
        "x-queue-time": _ms(timings.queue_s),
        "x-inference-time": _ms(timings.inference_s),
        "x-time-per-token": _ms(timings.inference_s / max(1, timings.generated_tokens)),
        "x-prompt-tokens": str(validated.input_length),
        "x-generated-tokens": str(timings.generated_tokens),
        **cut,
    }


def stream_headers(compute_type: str, characters: int) -> dict[str, str]:
    """Of an answer whose cost is not known yet."""
    return {"x-compute-type": compute_type, "x-compute-characters": str(characters)}


def lower_cased(app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    """The same WSGI application, with the names of its headers in lower case, as the original writes them."""

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        def start(status: str, headers: list[tuple[str, str]], *error: Any) -> Any:
            return start_response(status, [(name.lower(), value) for name, value in headers], *error)

        return app(environ, start)

    return answer


def _ms(seconds: float) -> str:
    return str(int(seconds * 1000))
