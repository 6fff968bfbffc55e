"""Bearer tokens of the OpenAI path, as `sagemaker.core.token_generator.generate_token` makes them, and their validity.

Knows no key: a token's form, action and time are looked at, its signature is not.
"""

import base64
import binascii
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs, urlencode, urlsplit

PREFIX = "sagemaker-api-key-"
HOST = "sagemaker.amazonaws.com"
ACTION = "CallWithBearerToken"
LONGEST = timedelta(hours=12)
DATE_FORMAT = "%Y%m%dT%H%M%SZ"


def make_token(now: datetime) -> str:
    """A token of the right form, good for twelve hours here and for nothing at AWS."""
    query = {
        "Action": ACTION,
        "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
        "X-Amz-Date": now.astimezone(UTC).strftime(DATE_FORMAT),
        "X-Amz-Expires": str(int(LONGEST.total_seconds())),
        "X-Amz-SignedHeaders": "host",
        "X-Amz-Signature": "emulated",
        "Version": "1",
    }
    return PREFIX + base64.b64encode(f"{HOST}/?{urlencode(query)}".encode()).decode()


def token_trouble(authorization: str | None, now: datetime) -> str | None:
    """Why AWS would refuse this `Authorization` header; None if it has no reason to that can be seen here."""
    scheme, _, token = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not token.startswith(PREFIX):
        return f"Give 'Authorization: Bearer {PREFIX}...', as sagemaker.core.token_generator.generate_token makes it."
    try:
        address = base64.b64decode(token.removeprefix(PREFIX), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return f"What follows {PREFIX} is not base64."
    query = {name: values[0] for name, values in parse_qs(urlsplit(f"https://{address}").query).items()}
    if query.get("Action") != ACTION:
        return f"The token is not one for {ACTION}."
    try:
        begun = datetime.strptime(query["X-Amz-Date"], DATE_FORMAT).replace(tzinfo=UTC)
        lasts = timedelta(seconds=int(query["X-Amz-Expires"]))
    except (KeyError, ValueError):
        return "The token says no time at which it expires."
    if lasts > LONGEST:
        return "The token lasts longer than twelve hours."
    if now > begun + lasts:
        return f"The token expired at {begun + lasts:%Y-%m-%d %H:%M:%S} UTC; generate_token makes a new one."
    return None
