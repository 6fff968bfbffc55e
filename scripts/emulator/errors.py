"""The errors of SageMaker's runtime API, as botocore reads them off the wire.

Knows no route.
"""

import json
from collections.abc import Mapping

ACCOUNT = "111122223333"
REGION = "us-east-1"
VARIANT = "AllTraffic"


class ServiceError(Exception):
    """An answer that boto3 raises as an exception of the same name.

    Attributes:
        status: of HTTP.
        code: the name of the exception, for `x-amzn-errortype`; None where AWS gives none and clients see the status.
        fields: of the JSON body besides `Message`.
    """

    def __init__(self, status: int, code: str | None, message: str, fields: Mapping[str, object] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.fields = dict(fields or {})

    def body(self) -> bytes:
        """The JSON that goes over the wire."""
        return json.dumps({**self.fields, "Message": str(self)}).encode()


def invalid(message: str, **fields: str) -> ServiceError:
    """The request is wrong, whatever the container would say."""
    return ServiceError(400, "ValidationError", message, fields)


def unavailable(message: str) -> ServiceError:
    """Nobody can answer now. boto3 sends such a request again."""
    return ServiceError(503, "ServiceUnavailable", message)


def unsigned(message: str) -> ServiceError:
    """The request names nobody."""
    return ServiceError(403, "MissingAuthenticationTokenException", message)


def too_large(limit_bytes: int) -> ServiceError:
    """The body is larger than the platform takes; it does not reach the container."""
    return ServiceError(413, None, f"HTTP content length exceeded {limit_bytes} bytes.")


def model_error(endpoint: str, status: int, body: str) -> ServiceError:
    """What every failure of a container becomes: 424, with the container's own words inside.

    Args:
        endpoint: its name.
        status: the container's; 0 where none came.
        body: the container's, or the platform's reason where none came.
    """
    side = "client" if 400 <= status < 500 else "server"
    group = f"/aws/sagemaker/Endpoints/{endpoint}"
    where = f"https://{REGION}.console.aws.amazon.com/cloudwatch/home?region={REGION}#logEventViewer:group={group}"
    return ServiceError(
        424,
        "ModelError",
        f'Received {side} error ({status}) from primary with message "{body}". See {where} in account {ACCOUNT} for '
        "more information.",
        {
            "OriginalStatusCode": status,
            "OriginalMessage": body,
            "LogStreamArn": f"arn:aws:logs:{REGION}:{ACCOUNT}:log-group:{group}:log-stream:{VARIANT}/i-0",
        },
    )
