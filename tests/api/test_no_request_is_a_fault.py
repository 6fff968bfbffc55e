"""Whatever a body holds, the answer is an answer or the client's fault, and nothing stays held."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.api.schemas.chat import ChatRequest
from serving.api.schemas.completions import CompletionRequest
from serving.api.schemas.native import GenerateParameters

odd = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(
        [0, 1, -1, 2, 1.0, 0.5, 1e-45, 3.4e38, 1e308, 2**31, 2**32 - 1, 2**64 - 1, 2**64, 10**400, "", "x"]
    ),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.one_of(st.integers(-1, 300), st.text(max_size=3)), max_size=6),
    st.dictionaries(st.text(max_size=3), st.integers(-1, 300), max_size=3),
    st.dictionaries(st.integers(0, 300).map(str), st.floats(-101, 101), max_size=3),
)
parameters = st.dictionaries(st.sampled_from([*GenerateParameters.model_fields, "typo"]), odd, max_size=4)
message = st.one_of(
    odd,
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool"]), "content": st.text(max_size=20) | odd}
    ),
)
chats = st.builds(
    lambda messages, fields: {**fields, "messages": messages},
    st.lists(message, max_size=3),
    st.dictionaries(
        st.sampled_from([name for name in ChatRequest.model_fields if name != "messages"]), odd, max_size=4
    ),
)
completions = st.builds(
    lambda prompt, fields: {**fields, "prompt": prompt},
    st.text(max_size=20) | odd | st.lists(st.lists(st.integers(0, 258), max_size=3), max_size=3),
    st.dictionaries(
        st.sampled_from([name for name in CompletionRequest.model_fields if name != "prompt"]), odd, max_size=4
    ),
)
instances = st.lists(
    chats | st.fixed_dictionaries({"inputs": st.text(max_size=20)}, optional={"parameters": parameters})
)
bodies = st.one_of(
    odd,
    chats,
    completions,
    st.fixed_dictionaries({"instances": instances | odd}),
    st.fixed_dictionaries(
        {"inputs": st.text(max_size=20)}, optional={"parameters": parameters | odd, "stream": odd, "messages": odd}
    ),
)
PATHS = [
    "/",
    "/generate",
    "/generate_stream",
    "/invocations",
    "/tokenize",
    "/chat_tokenize",
    "/vertex",
    "/v1/chat/completions",
    "/v1/completions",
]


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(body=bodies)
def test_no_body_is_a_fault(server, path, body):
    text = json.dumps(body).encode()
    response = server.client.post(path, data=text, content_type="application/json")
    assert response.status_code in (200, 400, 422, 429), response.data
    assert b'"error_type":"internal"' not in response.get_data()
    response.close()
    assert server.bridge.open_requests == 0
