"""The pages for people: the API's document, Swagger UI over it, and the playground; all of it works offline.

Knows no model and no request but these.
"""

import hashlib
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import PurePath
from types import MappingProxyType

import msgspec
from flask import Response, request
from werkzeug.exceptions import NotFound

from serving.api import errors

DOCS_PAGE, PLAYGROUND_PAGE = "docs.html", "playground.html"
DOCS_OWN_FILES = ("docs.css", "docs.js", "icon.svg")
SWAGGER_FILES = ("swagger-ui-bundle.js", "swagger-ui.css")
DOCS_FILES = (*DOCS_OWN_FILES, *SWAGGER_FILES)
PLAYGROUND_FILES = ("icon.svg", "playground.css", "playground.js")

CONTENT_TYPES = MappingProxyType(
    {
        ".css": "text/css; charset=utf-8",
        ".html": "text/html; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".json": "application/json",
        ".svg": "image/svg+xml",
    }
)
# Nothing from another origin, nothing inline; `data:` is for the icons in Swagger UI's style sheet.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = MappingProxyType(
    {
        "cache-control": "no-cache",
        "content-security-policy": POLICY,
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }
)


class Docs:
    """The handlers of the pages. Their files are read once.

    Args:
        document: the API's own description.
    """

    def __init__(self, document: Mapping[str, object]) -> None:
        own = resources.files("serving.api") / "pages"
        swagger = resources.files("flask_swagger_ui") / "dist"
        self._docs = _read(own, (DOCS_PAGE, *DOCS_OWN_FILES)) | _read(swagger, SWAGGER_FILES)
        self._playground = _read(own, (PLAYGROUND_PAGE, *PLAYGROUND_FILES))
        self._document = _File("openapi.json", msgspec.json.encode(document))

    def openapi(self) -> Response:
        """`GET /api-doc/openapi.json`."""
        return self._document.response()

    def docs(self) -> Response:
        """`GET /docs`: where the page is."""
        response = errors.empty(HTTPStatus.SEE_OTHER)
        response.headers["location"] = "/docs/"
        return response

    def docs_page(self) -> Response:
        """`GET /docs/`."""
        return self._docs[DOCS_PAGE].response()

    def docs_file(self, name: str) -> Response:
        """`GET /docs/{name}`."""
        return _chosen(self._docs, name, DOCS_FILES).response()

    def playground(self) -> Response:
        """`GET /playground`."""
        return self._playground[PLAYGROUND_PAGE].response()

    def playground_file(self, name: str) -> Response:
        """`GET /playground/{name}`."""
        return _chosen(self._playground, name, PLAYGROUND_FILES).response()


class _File:
    """What a browser is given under a name."""

    def __init__(self, name: str, content: bytes) -> None:
        self._content = content
        self._content_type = CONTENT_TYPES[PurePath(name).suffix]
        self._etag = hashlib.blake2b(content, digest_size=16).hexdigest()

    def response(self) -> Response:
        """The file, or 304 for a browser that has it."""
        response = Response(self._content, headers=dict(HEADERS), content_type=self._content_type)
        response.set_etag(self._etag)
        response.make_conditional(request)
        return response


def _read(directory: Traversable, names: Iterable[str]) -> dict[str, _File]:
    return {name: _File(name, (directory / name).read_bytes()) for name in names}


def _chosen(files: Mapping[str, _File], name: str, names: Iterable[str]) -> _File:
    """Only names that are listed: no path of a request ever reaches a file system."""
    if name not in names:
        raise NotFound
    return files[name]
