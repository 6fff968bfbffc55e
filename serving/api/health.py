"""What operators ask: whether the server is well, who it is, and its metrics.

Knows no generation.
"""

from http import HTTPStatus

import msgspec
from flask import Response

from serving.api import errors
from serving.api.identity import Identity
from serving.api.schemas.native import Info
from serving.bridge import Bridge
from serving.errors import Unhealthy
from serving.settings import Settings
from serving.telemetry.metrics import CONTENT_TYPE, Metrics
from serving.validation.validator import Validator

ROUTER = "weir"


class Health:
    """The handlers of the operators' routes."""

    def __init__(self, bridge: Bridge[Validator], settings: Settings, metrics: Metrics, identity: Identity) -> None:
        self._bridge = bridge
        self._settings = settings
        self._metrics = metrics
        self._identity = identity

    def health(self) -> Response:
        """`GET /health`, `/ping` and `/`: whether a request sent now would be served."""
        if not self._bridge.healthy():
            raise Unhealthy
        return errors.empty(HTTPStatus.OK)

    def info(self) -> Response:
        """`GET /info`."""
        validator = self._bridge.loaded()
        limits, facts, settings, identity = validator.limits, validator.facts, self._settings, self._identity
        info = Info(
            model_id=identity.model_id,
            model_sha=validator.origin.sha,
            model_pipeline_tag=validator.origin.pipeline_tag,
            max_concurrent_requests=settings.max_concurrent_requests,
            max_best_of=limits.max_best_of,
            max_stop_sequences=limits.max_stop_sequences,
            max_input_tokens=limits.max_input_tokens,
            max_total_tokens=limits.max_total_tokens,
            validation_workers=settings.validation_workers,
            max_client_batch_size=settings.max_client_batch_size,
            router=ROUTER,
            version=identity.version,
            sha=identity.sha,
            docker_label=identity.docker_label,
            model_dtype=facts.dtype,
            model_device_type="cpu" if facts.device == "cpu" else "cuda",
            max_batch_size=facts.max_rows,
            max_batch_prefill_tokens=facts.max_step_tokens,
            max_batch_total_tokens=facts.kv_tokens,
            max_position_embeddings=facts.max_position,
            num_shard=facts.rank_count,
            weight_bytes=facts.weight_bytes,
            kv_cache_bytes=facts.kv_bytes,
        )
        return Response(msgspec.json.encode(info), content_type="application/json")

    def metrics(self) -> Response:
        """`GET /metrics`."""
        return Response(self._metrics.render(), content_type=CONTENT_TYPE)
