"""What the emulator writes and checks by itself: event-stream frames, tokens, storage, limits."""

import base64
import json
from datetime import UTC, datetime, timedelta

import pytest
from botocore.auth import SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.eventstream import EventStreamBuffer
from hypothesis import given
from hypothesis import strategies as st

from scripts.emulator.eventstream import Cutter, failure, message, payload_part
from scripts.emulator.limits import Limits, environment_trouble
from scripts.emulator.model_directory import Snapshot
from scripts.emulator.storage import Storage, StorageError
from scripts.emulator.tokens import PREFIX, make_token, token_trouble


def decoded(data: bytes):
    """By botocore's own decoder, which checks both checksums."""
    buffer = EventStreamBuffer()
    buffer.add_data(data)
    return [event.to_response_dict() for event in buffer]


@given(st.lists(st.binary(max_size=300), max_size=5))
def test_botocore_reads_back_every_payload(payloads):
    found = decoded(b"".join(payload_part(payload) for payload in payloads))
    assert [event["body"] for event in found] == payloads
    for event in found:
        assert event["status_code"] == 200
        assert event["headers"][":event-type"] == "PayloadPart"


@given(st.dictionaries(st.text(min_size=1, max_size=20), st.text(max_size=40), max_size=4), st.binary(max_size=50))
def test_botocore_reads_back_every_header(headers, payload):
    # botocore takes a message type it knows, and none of its own header names twice.
    headers = {f"x{name}": value for name, value in headers.items()} | {":message-type": "event"}
    [event] = decoded(message(headers, payload))
    assert (event["headers"], event["body"]) == (headers, payload)


def test_a_failure_is_an_exception_to_botocore():
    [event] = decoded(failure("ModelStreamError", "it broke", "StreamBroken"))
    assert event["status_code"] == 400
    assert event["headers"][":exception-type"] == "ModelStreamError"
    assert json.loads(event["body"]) == {"Message": "it broke", "ErrorCode": "StreamBroken"}


@given(st.binary(max_size=500), st.integers(0, 5), st.integers(1, 9))
def test_cutting_loses_nothing_and_repeats_with_its_seed(data, seed, largest):
    parts = list(Cutter(seed, largest).cut(data))
    assert b"".join(parts) == data
    assert all(1 <= len(part) <= largest for part in parts)
    assert parts == list(Cutter(seed, largest).cut(data))


def test_cuts_are_random_and_can_be_left_out():
    data = bytes(1000)
    assert len({tuple(map(len, Cutter(seed, 9).cut(data))) for seed in range(5)}) == 5
    assert list(Cutter(0, 0).cut(data)) == [data]


NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)


def test_a_token_of_ours_is_good_for_twelve_hours():
    header = f"Bearer {make_token(NOW)}"
    assert token_trouble(header, NOW + timedelta(hours=11, minutes=59)) is None
    assert "expired" in token_trouble(header, NOW + timedelta(hours=12, seconds=1))


def test_a_token_made_with_botocore_as_the_sdk_makes_it_is_good():
    request = AWSRequest(
        "POST",
        url="https://sagemaker.amazonaws.com/",
        headers={"host": "sagemaker.amazonaws.com"},
        params={"Action": "CallWithBearerToken"},
    )
    SigV4QueryAuth(Credentials("key", "secret"), "sagemaker", "us-east-1", expires=43200).add_auth(request)
    signed = request.url.removeprefix("https://") + "&Version=1"
    token = PREFIX + base64.b64encode(signed.encode()).decode()
    assert token_trouble(f"Bearer {token}", datetime.now(UTC)) is None


def encoded(query: str) -> str:
    return f"Bearer {PREFIX}" + base64.b64encode(f"sagemaker.amazonaws.com/?{query}".encode()).decode()


@pytest.mark.parametrize(
    ("authorization", "said"),
    [
        (None, "generate_token"),
        ("Bearer sk-123", "generate_token"),
        ("AWS4-HMAC-SHA256 Credential=x", "generate_token"),
        (f"Bearer {PREFIX}%%%", "base64"),
        (encoded("Action=ListModels"), "CallWithBearerToken"),
        (encoded("Action=CallWithBearerToken"), "expires"),
        (encoded("Action=CallWithBearerToken&X-Amz-Date=20261121T120000Z&X-Amz-Expires=86400"), "twelve hours"),
    ],
)
def test_what_aws_would_not_take_is_refused_with_a_reason(authorization, said):
    assert said in token_trouble(authorization, NOW)


def test_s3_is_a_directory(tmp_path):
    storage = Storage(tmp_path)
    storage.write("s3://bucket/a/b.json", b"one")
    assert (tmp_path / "bucket/a/b.json").read_bytes() == storage.read("s3://bucket/a/b.json") == b"one"
    storage.write(f"file://{tmp_path}/c%20d", b"two")
    assert (tmp_path / "c d").read_bytes() == b"two"
    assert sorted(path.name for path in (tmp_path / "bucket/a").iterdir()) == ["b.json"]


@pytest.mark.parametrize(
    "location", ["s3://bucket", "https://x/y", "plain", "s3://../x", "s3://b/../../x", "s3://b/no"]
)
def test_a_location_outside_or_nowhere_is_refused(tmp_path, location):
    with pytest.raises(StorageError, match=r"neither|leads out|cannot be read"):
        Storage(tmp_path / "root").read(location)


def test_scaling_leaves_what_a_container_needs_real_time_for():
    limits = Limits().scaled(0.1)
    assert (limits.invoke_s, limits.stream_s, limits.stop_s, limits.startup_s) == (6, 48, 3, 48)
    assert (limits.ping_timeout_s, limits.connect_timeout_s, limits.payload_bytes) == (2, 0.25, 25 * 1024 * 1024)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({f"A{n}": "" for n in range(101)}, "101 variables"),
        ({"A": "x" * 1025}, "A is longer"),
        ({f"A{n}": "x" * 1000 for n in range(40)}, "together"),
    ],
)
def test_an_environment_that_createmodel_would_refuse_is_named(environment, said):
    assert said in environment_trouble(environment)


def test_an_environment_at_the_limits_passes():
    assert environment_trouble({f"A{n}": "x" * 300 for n in range(100)}) is None
    assert environment_trouble({"A": "x" * 1024}) is None


def test_a_written_model_directory_is_noticed(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "weights").write_text("a")
    before = Snapshot.take(tmp_path)
    assert before.changes() is None
    (tmp_path / "cache").write_text("b")
    (tmp_path / "sub" / "weights").write_text("longer")
    assert before.changes() == "cache, sub/weights"
