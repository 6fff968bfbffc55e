"""Fixtures for every unit test that asks for them."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture
def logging_restored() -> Iterator[None]:
    """Logging as it was before, after a test that configured it."""
    names = ["", "serving", "gunicorn"]
    before = [(name, logging.getLogger(name).level, logging.getLogger(name).handlers[:]) for name in names]
    yield
    logging.captureWarnings(False)
    for name, level, handlers in before:
        logging.getLogger(name).setLevel(level)
        logging.getLogger(name).handlers[:] = handlers
