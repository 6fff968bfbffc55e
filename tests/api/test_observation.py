"""What is noted of a request: its name, its status and its way, once its answer has ended."""

import pytest

from serving.api.app import create_app
from serving.api.identity import Identity
from serving.api.observation import HANDLERS
from serving.settings import Settings
from serving.telemetry.journal import RequestRecord

UNOBSERVED = {"/ping", "/adapters"}  # asked every second, and about no work


class Kept(list):
    """A journal that is read by the test."""

    def add(self, record: RequestRecord) -> None:
        self.append(record)


@pytest.fixture
def journal() -> Kept:
    return Kept()


@pytest.fixture
def observed(server, journal):
    """A client of the shared server's model whose requests are noted."""

    def make(**settings):
        app = create_app(
            bridge=server.bridge,
            settings=Settings(**settings),
            metrics=server.metrics,
            identity=Identity(model_id="demo/model", version="1.2.3"),
            adapters=server.adapters,
            journal=journal,
        )
        return app.test_client()

    return make


def test_every_route_of_work_has_a_name(server):
    posts = {rule.rule for rule in server.app.url_map.iter_rules() if "POST" in (rule.methods or ())}
    assert posts - UNOBSERVED == set(HANDLERS)


def test_a_whole_answer_is_noted_with_what_it_cost(observed, journal):
    response = observed().post("/generate", json={"inputs": "say:abc"}, headers={"x-request-id": "mine"})
    response.close()
    (record,) = journal
    assert (record.handler, record.route, record.status) == ("generate", "/generate", 200)
    assert (record.request_id, record.model, record.error) == ("mine", "demo/model", None)
    (generation,) = record.generations
    assert (generation.input_length, generation.generated_tokens, generation.stream) == (8, 4, False)
    (sample,) = generation.samples.values()
    moments = [record.arrived, generation.arrived, generation.validated, sample.first.arrived, sample.first.begun]
    moments += [sample.first.reached, sample.ended, record.ended]
    assert moments == sorted(moments)


def test_a_stream_is_noted_at_its_end(observed, journal):
    response = observed().post("/generate_stream", json={"inputs": "say:abc"}, buffered=False)
    frames = iter(response.response)
    next(frames)
    assert not journal
    list(frames)
    response.close()
    (record,) = journal
    assert record.generations[0].stream
    assert record.generated_tokens == 4
    assert record.error is None


def test_a_stream_that_is_left_is_noted_as_dropped(observed, journal):
    response = observed().post("/generate_stream", json={"inputs": "say:abc"}, buffered=False)
    next(iter(response.response))
    response.close()
    (record,) = journal
    assert (record.status, record.error, record.generated_tokens) == (200, "dropped", 1)


def test_a_stream_that_nobody_reads_is_noted_as_dropped(observed, journal):
    observed().post("/generate_stream", json={"inputs": "say:abc"}, buffered=False).close()
    (record,) = journal
    assert record.error == "dropped"


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        ({"json": {"inputs": "a", "parameters": {"max_new_tokens": 0}}}, 422, "validation"),
        ({"json": {}}, 422, "422"),
        ({"data": "a"}, 415, "415"),
    ],
)
def test_refusals_are_noted_too(observed, journal, body, status, error):
    observed().post("/generate", **body).close()
    (record,) = journal
    assert (record.status, record.error) == (status, error)


def test_strangers_are_noted(observed, journal):
    observed(api_key="secret").post("/generate", json={"inputs": "a"}).close()
    (record,) = journal
    assert (record.status, record.error) == (401, "401")


def test_several_prompts_are_one_request_with_all_their_tokens(observed, journal):
    body = {"model": "tgi", "prompt": ["say:ab", "say:c"], "max_tokens": 8}
    observed().post("/v1/completions", json=body).close()
    (record,) = journal
    assert record.handler == "completions"
    assert record.generated_tokens == 3 + 2
    assert len(record.samples()) == 2


def test_questions_of_operators_are_not_noted(observed, journal):
    client = observed()
    for path in ("/", "/health", "/ping", "/info", "/metrics", "/v1/models", "/no/such/route"):
        client.get(path).close()
    client.post("/ping").close()
    client.post("/no/such/route").close()
    assert not journal
