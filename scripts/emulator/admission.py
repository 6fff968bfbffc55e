"""What a call of the runtime API asks for, checked as the platform checks it before any container sees it.

Knows no container; each refusal says what the caller should have sent.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from flask import Request

from scripts.emulator.errors import ACCOUNT, VARIANT, invalid, too_large, unsigned
from scripts.emulator.limits import Limits
from scripts.emulator.sessions import IDENTIFIER, LONGEST_ID, NEW_SESSION, SESSION

FAMILY = "X-Amzn-SageMaker-"
CONTENT_TYPE = FAMILY + "Content-Type"
ACCEPT = FAMILY + "Accept"
ATTRIBUTES = FAMILY + "Custom-Attributes"
COMPONENT = FAMILY + "Inference-Component"
INFERENCE_ID = FAMILY + "Inference-Id"
TARGET_VARIANT = FAMILY + "Target-Variant"
ADAPTER_IDENTIFIER = FAMILY + "Adapter-Identifier"
ADAPTER_ALIAS = FAMILY + "Adapter-Alias"
# The platform's own business; containers do not see them.
CONSUMED = {
    CONTENT_TYPE, ACCEPT, FAMILY + "InputLocation", FAMILY + "S3OutputPathExtension", FAMILY + "Filename",
    FAMILY + "RequestTTLSeconds", FAMILY + "InvocationTimeoutSeconds", ADAPTER_IDENTIFIER, ADAPTER_ALIAS,
}  # fmt: skip
FOR_OTHER_ENDPOINTS = {
    FAMILY + "Target-Model": "multi-model endpoints",
    FAMILY + "Target-Container-Hostname": "multi-container endpoints with direct invocation",
}
VISIBLE = re.compile(r"[\x20-\x7e]*")
INFERENCE_ID_FORM = re.compile(r"\S[\x20-\x7e]{0,63}")
SIGNATURE = "AWS4-HMAC-SHA256"


class Operation(StrEnum):
    """A call of the API."""

    INVOKE = "InvokeEndpoint"
    STREAM = "InvokeEndpointWithResponseStream"
    ASYNC = "InvokeEndpointAsync"


@dataclass(frozen=True, slots=True)
class Offer:
    """What can be called.

    Attributes:
        endpoint: the name of the real-time endpoint.
        async_endpoint: the name under which the same container takes InvokeEndpointAsync.
        components: names of inference components.
        adapters: names of adapter components, and where each adapter lies for the container.
        results: the location below which asynchronous results go.
        failures: and their errors.
    """

    endpoint: str
    async_endpoint: str
    components: tuple[str, ...]
    adapters: Mapping[str, str]
    results: str
    failures: str


def admit(request: Request, endpoint: str, operation: Operation, offer: Offer, limits: Limits) -> dict[str, str]:
    """Check a signed call, and return the headers that reach the container, with names in small letters.

    Raises:
        ServiceError: the platform would refuse it.
    """
    if not request.headers.get("Authorization", "").startswith(SIGNATURE):
        raise unsigned(
            "The request is not signed. boto3 signs with any credentials (AWS_ACCESS_KEY_ID=x "
            "AWS_SECRET_ACCESS_KEY=x); curl does with --aws-sigv4 aws:amz:us-east-1:sagemaker --user x:x. The "
            "signature itself is not verified here."
        )
    _demand_endpoint(endpoint, operation, offer)
    _demand_headers(request, operation, limits)
    component = _component(request.headers.get(COMPONENT), offer)
    return {**_forwarded(request, operation), **component}


def body_of(request: Request, limit_bytes: int) -> bytes:
    """The body, byte for byte. Raises ServiceError beyond the limit, where the container sees nothing of it."""
    if (request.content_length or 0) > limit_bytes:
        raise too_large(limit_bytes)
    body = request.stream.read(limit_bytes + 1)
    if len(body) > limit_bytes:
        raise too_large(limit_bytes)
    return body


def component_headers(name: str | None, offer: Offer) -> dict[str, str]:
    """What the platform adds for an inference component. Raises ServiceError where there is no such component."""
    return _component(name, offer)


def visible(text: str, limits: Limits) -> bool:
    """Whether these can be CustomAttributes."""
    return len(text) <= limits.attribute_characters and VISIBLE.fullmatch(text) is not None


def _demand_endpoint(endpoint: str, operation: Operation, offer: Offer) -> None:
    if endpoint == offer.async_endpoint and operation is not Operation.ASYNC:
        raise invalid(
            f"Endpoint {endpoint} has an AsyncInferenceConfig and takes InvokeEndpointAsync only; {offer.endpoint} is "
            "the real-time one."
        )
    if endpoint == offer.endpoint and operation is Operation.ASYNC:
        raise invalid(
            f"Endpoint {endpoint} has no AsyncInferenceConfig and does not take InvokeEndpointAsync; "
            f"{offer.async_endpoint} is the asynchronous one."
        )
    if endpoint not in (offer.endpoint, offer.async_endpoint):
        raise invalid(
            f"Endpoint {endpoint} of account {ACCOUNT} not found. (Here there are {offer.endpoint} and, for "
            f"asynchronous calls, {offer.async_endpoint}.)"
        )


def _demand_headers(request: Request, operation: Operation, limits: Limits) -> None:
    headers = request.headers
    if not visible(headers.get(ATTRIBUTES, ""), limits):
        raise _unfit("customAttributes", f"at most {limits.attribute_characters} visible ASCII characters")
    if (identifier := headers.get(INFERENCE_ID)) is not None and not INFERENCE_ID_FORM.fullmatch(identifier):
        raise _unfit("inferenceId", "1 to 64 printable characters, the first of them not a space")
    if (variant := headers.get(TARGET_VARIANT)) not in (None, VARIANT):
        raise invalid(f"Variant {variant} not found; the only one is {VARIANT}.")
    for name, where in FOR_OTHER_ENDPOINTS.items():
        if name in headers:
            raise invalid(f"{name} is for {where}; this emulator has none.")
    _demand_session(headers.get(SESSION), operation)


def _demand_session(session: str | None, operation: Operation) -> None:
    if session is None:
        return
    if session == NEW_SESSION and operation is not Operation.INVOKE:
        raise invalid(f"{operation} cannot create a session: do it with InvokeEndpoint and SessionId=NEW_SESSION.")
    if operation is Operation.ASYNC:
        raise invalid("InvokeEndpointAsync takes no session.")
    if session != NEW_SESSION and (len(session) > LONGEST_ID or not IDENTIFIER.fullmatch(session)):
        raise _unfit("sessionId", "the id alone: what stands before the semicolon in NewSessionId")


def _component(name: str | None, offer: Offer) -> dict[str, str]:
    if name is None:
        if offer.components or offer.adapters:
            raise invalid(
                "Inference Component Name header is required for endpoints to which you plan to deploy inference "
                "components. Please include Inference Component Name header or consider using SageMaker models.",
                ErrorCode="INFERENCE_COMPONENT_NAME_MISSING",
            )
        return {}
    if name in offer.adapters:
        return {header.lower(): name for header in (COMPONENT, ADAPTER_IDENTIFIER, ADAPTER_ALIAS)}
    if name not in offer.components:
        known = ", ".join((*offer.components, *offer.adapters)) or "none; --inference-component adds one"
        raise invalid(f"Inference Component {name} not found. (Here there is: {known}.)")
    return {COMPONENT.lower(): name}


def _forwarded(request: Request, operation: Operation) -> dict[str, str]:
    """Content-Type, Accept and the family; everything else is stripped."""
    plain = operation is Operation.INVOKE
    found = {
        "content-type": request.headers.get("Content-Type" if operation is not Operation.ASYNC else CONTENT_TYPE),
        "accept": request.headers.get("Accept" if plain else ACCEPT),
    }
    consumed = {name.lower() for name in CONSUMED}
    found |= {
        name.lower(): value
        for name, value in request.headers.items()
        if name.lower().startswith(FAMILY.lower()) and name.lower() not in consumed
    }
    return {name: value for name, value in found.items() if value}


def _unfit(member: str, wanted: str) -> Exception:
    return invalid(
        f"1 validation error detected: Value at '{member}' failed to satisfy constraint: it must be {wanted}"
    )
