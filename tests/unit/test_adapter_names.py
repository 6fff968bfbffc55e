"""What adapters are called, and how an operator names those to load."""

import pytest

from serving.adapter_names import NamedAdapter, parse
from serving.errors import ConfigurationError


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("org/name", NamedAdapter("org/name", "org/name")),
        ("org/name@v1", NamedAdapter("org/name", "org/name", "v1")),
        ("org/name@refs/pr/1", NamedAdapter("org/name", "org/name", "refs/pr/1")),
        ("adapters/here", NamedAdapter("adapters/here", "adapters/here")),
        ("french=/opt/fr", NamedAdapter("french", "/opt/fr")),
        ("french=/opt/fr@2=b", NamedAdapter("french", "/opt/fr@2=b")),
        ("french=./fr@2", NamedAdapter("french", "./fr@2")),
        ("french=s3://bucket/fr@2", NamedAdapter("french", "s3://bucket/fr@2")),
        ("french=org/name@v1", NamedAdapter("french", "org/name", "v1")),
    ],
)
def test_every_way_to_name_one_is_read_and_written(text, named):
    assert parse(text) == named
    assert parse(str(named)) == named


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("=/opt/fr", "the name in '=/opt/fr' must consist of letters"),
        ("french=", "names no place"),
        ("@v1", "names no place"),
        ("org/name@", "ends before its revision"),
        ("/opt/fr", "write org/name, org/name@revision or name=/path"),
        ("s3://bucket/fr", "write org/name, org/name@revision or name=/path"),
        ("a b=/opt/fr", "must consist of letters"),
        ("../fr=/opt/fr", "must consist of letters"),
        ("x" * 201 + "=/opt/fr", "at most 200 characters"),
    ],
)
def test_what_names_none_is_refused_in_one_line_that_says_what_to_write(text, words):
    with pytest.raises(ConfigurationError) as error:
        parse(text)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
