"""`/metrics` of a server that has served requests, and what speaks of it: the documentation and the dashboard."""

import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

DOCS = Path(__file__).parents[2] / "docs"
NAME = re.compile(r"\b(?:tgi|weir)_\w+")
ROW = re.compile(r"\| `(\w+)` \| (\w+) \|([^|]*)\|")
GRID_WIDTH = 24


@pytest.fixture(scope="module")
def served():
    """The exposition after requests that ended in every way: alone, together, badly, and with the device's death."""
    from api.conftest import Server

    from serving.settings import Settings

    server = Server(settings=Settings(), die_after=30, delay_s=0.005).wait()
    try:
        long = {"inputs": "say:" + "a" * 30, "parameters": {"max_new_tokens": 20}}
        stream = server.client.post("/generate_stream", json=long, buffered=False)
        frames = iter(stream.response)
        next(frames)
        server.client.post("/generate", json={"inputs": "say:hello"})
        list(frames)
        server.client.post("/generate", json=long)  # the device dies and another one goes on
        server.client.post("/generate", json={"inputs": "a", "parameters": {"max_new_tokens": 0}})
        response = server.client.get("/metrics")
        assert response.content_type == "text/plain; charset=utf-8"
        yield response.get_data(as_text=True)
    finally:
        server.bridge.close()


def samples(exposition: str) -> dict[str, set[str]]:
    """The names of all samples, with their labels' names."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            name = sample.name.removesuffix("_total") if family.type == "counter" else sample.name
            found.setdefault(name, set()).update(sample.labels)
    return found


def test_every_metric_is_documented_with_its_type_and_labels(served):
    documented = {
        name: (kind, set(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels in ROW.findall((DOCS / "metrics.md").read_text())
    }
    shown = {
        family.name: (family.type, {label for sample in family.samples for label in sample.labels} - {"le", "quantile"})
        for family in text_string_to_metric_families(served)
    }
    assert documented == shown


def test_requests_add_up(served):
    lines = [line for line in served.splitlines() if line and not line.startswith("#")]
    values = {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}
    assert values["tgi_request_count"] == 4
    assert values["tgi_request_success"] == 3
    assert values['tgi_request_failure{err="validation"}'] == 1
    assert values["tgi_request_generated_tokens_sum"] == 20 + 6 + 20
    assert values["weir_generated_tokens"] == 20 + 6 + 20
    assert values["weir_time_to_first_token_duration_count"] == 3
    assert values["weir_inter_token_duration_count"] == 19 + 5 + 19
    assert values["tgi_request_skipped_tokens_count"] == 20 + 6 + 20
    begun, done, failed = (
        sum(values.get(f'tgi_batch_inference_{kind}{{method="{method}"}}', 0) for method in ("prefill", "decode"))
        for kind in ("count", "success", "failure")
    )
    assert begun == done + failed
    assert failed == 1
    assert values["tgi_batch_current_size"] == values["tgi_queue_size"] == 0


def test_a_stream_that_nobody_reads_counts_as_dropped(serve):
    server = serve()
    server.client.post("/generate_stream", json={"inputs": "a"}, buffered=False).close()
    assert server.metric('tgi_request_failure{err="dropped"}') == "1"
    assert server.bridge.open_requests == 0


@pytest.fixture(scope="module")
def dashboard() -> dict:
    return json.loads((DOCS / "grafana" / "weir.json").read_text())


def queries(dashboard: dict) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


def test_the_dashboard_asks_for_nothing_that_is_not_shown(served, dashboard):
    shown = samples(served)
    asked = {name for query in queries(dashboard) for name in NAME.findall(query)}
    asked |= {name for variable in dashboard["templating"]["list"] for name in NAME.findall(json.dumps(variable))}
    assert asked
    assert not asked - shown.keys()
    for query in queries(dashboard):
        grouped = {label for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(", ")}
        for name in NAME.findall(query):
            assert grouped <= shown[name], query


def test_the_dashboard_shows_everything_that_matters(dashboard):
    asked = {name for query in queries(dashboard) for name in NAME.findall(query)}
    for name in samples_of_ours():
        assert any(sample.startswith(name) for sample in asked), name
    assert {"tgi_request_count", "tgi_request_failure", "tgi_queue_size", "tgi_request_queue_duration_bucket"} <= asked


def samples_of_ours() -> list[str]:
    return [name for name, _, _ in ROW.findall((DOCS / "metrics.md").read_text()) if name.startswith("weir_")]


def test_the_dashboard_is_one_that_grafana_reads(dashboard):
    assert dashboard["schemaVersion"] >= 36
    assert dashboard["title"]
    assert dashboard.get("id") is None  # a number would overwrite whatever has it in the importing Grafana
    datasource, *variables = dashboard["templating"]["list"]
    assert (datasource["name"], datasource["type"], datasource["query"]) == ("datasource", "datasource", "prometheus")
    known = {variable["name"] for variable in [datasource, *variables]} | {"__rate_interval"}
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [cell for panel in panels for cell in covered(panel["gridPos"])]
    assert len(cells) == len(set(cells)), "panels lie upon each other"
    for panel in panels:
        assert panel["title"]
        assert panel["type"] in ("row", "stat", "timeseries")
        if panel["type"] == "row":
            continue
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
        for asked in [panel, *panel["targets"]]:
            assert asked["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        for target in panel["targets"]:
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= known
            assert all(target["expr"].count(left) == target["expr"].count(right) for left, right in ("()", "{}", "[]"))


def covered(place: dict[str, int]) -> list[tuple[int, int]]:
    assert place["x"] + place["w"] <= GRID_WIDTH
    return [
        (x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])
    ]
