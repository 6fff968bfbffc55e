"""Metrics: TGI's names, labels, buckets and dialect of the text format."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.protocol import StepStats
from serving.telemetry.metrics import Metrics


def stats(**changes) -> StepStats:
    usual = {
        "rows": 3,
        "prompt_tokens": 0,
        "started": 0,
        "waiting": 2,
        "running": 3,
        "preempted": 0,
        "blocks_used": 5,
        "blocks_total": 100,
        "blocks_leased": 3,
        "cached_tokens": 0,
        "forward_s": 0.010,
        "step_s": 0.012,
        "most_tokens": 300,
        "decode_s": 0.001,
        "filter_s": 0.0001,
        "skipped": (0, 0, 0),
        "gaps": ((0.011, 3),),
    }
    return StepStats(**{**usual, **changes})


@pytest.fixture
def metrics() -> Metrics:
    metrics = Metrics(clock=lambda: 0.0)
    metrics.model_loaded(max_input_tokens=1000, max_total_tokens=2000, block_size=16)
    return metrics


def lines(metrics: Metrics, name: str) -> list[str]:
    return [line for line in metrics.render().decode().splitlines() if line.startswith(name)]


def test_a_series_shows_up_with_its_first_event(metrics):
    assert metrics.render() == b""
    metrics.request_received()
    assert metrics.render() == (
        b"# HELP tgi_request_count Total number of requests\n# TYPE tgi_request_count counter\ntgi_request_count 1\n\n"
    )


def test_counters_have_no_total_and_nothing_has_created(metrics):
    metrics.request_received()
    metrics.request_failed("validation")
    metrics.step(stats(prompt_tokens=5, started=1))
    text = metrics.render().decode()
    assert "_total " not in text
    assert "_created" not in text
    assert 'tgi_request_failure{err="validation"} 1' in text


def test_a_finished_request_fills_every_duration(metrics):
    metrics.request_validated(input_length=7, max_new_tokens=20)
    metrics.request_succeeded(total_s=2.0, validation_s=0.1, queue_s=0.2, inference_s=1.5, generated_tokens=10)
    for name, total in [
        ("tgi_request_duration", "2"),
        ("tgi_request_validation_duration", "0.1"),
        ("tgi_request_queue_duration", "0.2"),
        ("tgi_request_inference_duration", "1.5"),
        ("tgi_request_mean_time_per_token_duration", "0.15"),
        ("tgi_request_generated_tokens", "10"),
        ("tgi_request_input_length", "7"),
        ("tgi_request_max_new_tokens", "20"),
    ]:
        assert lines(metrics, f"{name}_sum") == [f"{name}_sum {total}"]
        assert lines(metrics, f"{name}_count") == [f"{name}_count 1"]
    assert lines(metrics, "tgi_request_success") == ["tgi_request_success 1"]


def test_durations_have_the_buckets_of_tgi(metrics):
    metrics.request_succeeded(total_s=0.00015, validation_s=0, queue_s=0, inference_s=0, generated_tokens=0)
    buckets = lines(metrics, "tgi_request_duration_bucket")
    assert len(buckets) == 36
    # TGI multiplies step by step and prints the shortest number that reads back the same.
    assert buckets[0] == 'tgi_request_duration_bucket{le="0.00015000000000000001"} 1'
    assert float(buckets[-2].split('"')[1]) == pytest.approx(0.0001 * 1.5**35, rel=1e-5)
    assert buckets[-1] == 'tgi_request_duration_bucket{le="+Inf"} 1'


def test_token_counts_have_a_hundred_linear_buckets(metrics):
    metrics.request_validated(input_length=15, max_new_tokens=20)
    buckets = lines(metrics, "tgi_request_input_length_bucket")
    assert buckets[:2] == [
        'tgi_request_input_length_bucket{le="10"} 0',
        'tgi_request_input_length_bucket{le="20"} 1',
    ]
    assert buckets[99].startswith('tgi_request_input_length_bucket{le="1000"}')
    assert lines(metrics, "tgi_request_max_new_tokens_bucket")[99].split('"')[1] == "2000"


def test_a_step_with_prompt_tokens_is_a_prefill_and_one_without_a_decode(metrics):
    metrics.step(stats(prompt_tokens=9, started=2, joined=2, join_s=0.002))
    metrics.step(stats())
    metrics.step(stats())
    for name in ("tgi_batch_inference_count", "tgi_batch_inference_success"):
        assert lines(metrics, name) == [f'{name}{{method="prefill"}} 1', f'{name}{{method="decode"}} 2']
    for part, seconds in [("inference", "0.012"), ("forward", "0.01"), ("decode", "0.001"), ("filter", "0.0001")]:
        name = f"tgi_batch_{part}_duration_sum"
        assert lines(metrics, name)[0] == f'{name}{{method="prefill"}} {seconds}'
    assert lines(metrics, "tgi_batch_concat{") == ['tgi_batch_concat{reason="chunking"} 1']
    assert lines(metrics, "tgi_batch_concat_duration_sum") == ['tgi_batch_concat_duration_sum{method="decode"} 0.002']
    assert lines(metrics, "tgi_batch_next_size_sum") == ["tgi_batch_next_size_sum 2"]


def test_requests_that_start_alone_join_nobody(metrics):
    metrics.step(stats(prompt_tokens=9, started=3))
    assert not lines(metrics, "tgi_batch_concat")


def test_a_step_that_the_device_died_with_is_a_failure_and_takes_no_time(metrics):
    metrics.step(stats(prompt_tokens=9, started=2, failed=True))
    assert lines(metrics, "tgi_batch_inference_count") == ['tgi_batch_inference_count{method="prefill"} 1']
    assert lines(metrics, "tgi_batch_inference_failure") == ['tgi_batch_inference_failure{method="prefill"} 1']
    for name in ("tgi_batch_inference_success", "tgi_batch_forward_duration", "tgi_batch_next_size"):
        assert not lines(metrics, name)
    assert lines(metrics, "weir_prompt_tokens") == ["weir_prompt_tokens 0"]


def test_gauges_follow_the_engine_down_to_nothing(metrics):
    metrics.step(stats())
    assert lines(metrics, "tgi_queue_size") == ["tgi_queue_size 2"]
    assert lines(metrics, "tgi_batch_current_size") == ["tgi_batch_current_size 3"]
    assert lines(metrics, "tgi_batch_current_max_tokens") == ["tgi_batch_current_max_tokens 300"]
    assert lines(metrics, "tgi_batch_max_total_tokens") == ["tgi_batch_max_total_tokens 1600"]
    metrics.step(stats(rows=0, waiting=0, running=0, blocks_used=0, most_tokens=0))
    assert lines(metrics, "tgi_queue_size") == ["tgi_queue_size 0"]
    assert lines(metrics, "tgi_batch_current_size") == ["tgi_batch_current_size 0"]
    assert lines(metrics, "tgi_batch_current_max_tokens") == ["tgi_batch_current_max_tokens 0"]
    assert lines(metrics, "tgi_batch_inference_count") == ['tgi_batch_inference_count{method="decode"} 1']


def test_the_summary_has_the_quantiles_of_tgi_over_a_rolling_window():
    now = 0.0
    metrics = Metrics(clock=lambda: now)
    metrics.step(stats())
    names = [line.split('"')[1] for line in lines(metrics, "tgi_request_skipped_tokens{")]
    assert names == ["0", "0.5", "0.9", "0.95", "0.99", "0.999", "1"]
    metrics.step(stats(skipped=(0, 2, 1, 0, 0)))
    assert lines(metrics, "tgi_request_skipped_tokens_sum") == ["tgi_request_skipped_tokens_sum 3"]
    assert lines(metrics, "tgi_request_skipped_tokens_count") == ["tgi_request_skipped_tokens_count 8"]
    values = [float(line.split()[1]) for line in lines(metrics, "tgi_request_skipped_tokens{")]
    assert values == [0, 0, 2, 2, 2, 2, 2]
    now = 1000.0
    metrics.step(stats(skipped=(1,)))
    assert lines(metrics, 'tgi_request_skipped_tokens{quantile="0"}')[0].endswith(" 1")
    assert lines(metrics, "tgi_request_skipped_tokens_count") == ["tgi_request_skipped_tokens_count 9"]


def test_our_own_metrics_stand_beside_them(metrics):
    metrics.first_token(0.05)
    assert not lines(metrics, "weir_")
    metrics.step(stats(prompt_tokens=9, queried_tokens=41, cached_tokens=32))
    expected = {
        "weir_prompt_tokens": "9",
        "weir_generated_tokens": "3",
        "weir_prefix_queried_tokens": "41",
        "weir_prefix_hit_tokens": "32",
        "weir_preemptions": "0",  # there from the first step on, so that a rate can be taken of the first one
        "weir_kv_blocks_used": "5",
        "weir_kv_blocks": "100",
        "weir_kv_blocks_leased": "3",
        "weir_time_to_first_token_duration_count": "1",
        "weir_inter_token_duration_count": "3",
    }
    text = metrics.render().decode()
    for name, value in expected.items():
        assert f"\n{name} {value}\n" in text
    metrics.step(stats(preempted=2))
    assert lines(metrics, "weir_preemptions") == ["weir_preemptions 2"]


def test_the_time_between_tokens_is_counted_for_every_sequence(metrics):
    metrics.step(stats(gaps=((0.00015, 2), (0.5, 1), (1000.0, 1))))
    buckets = lines(metrics, "weir_inter_token_duration_bucket")
    assert len(buckets) == 36
    assert buckets[0].endswith(" 2")  # a bound is in its bucket
    assert buckets[-2].endswith(" 3")
    assert buckets[-1] == 'weir_inter_token_duration_bucket{le="+Inf"} 4'
    assert float(lines(metrics, "weir_inter_token_duration_sum")[0].split()[1]) == pytest.approx(1000.5003)


def test_prometheus_can_read_it(metrics):
    metrics.request_received()
    metrics.request_validated(input_length=7, max_new_tokens=20)
    metrics.request_succeeded(total_s=2.0, validation_s=0.1, queue_s=0.2, inference_s=1.5, generated_tokens=10)
    metrics.step(stats(prompt_tokens=9, started=2))
    text = metrics.render().decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families["tgi_request_duration"].type == "histogram"
    assert families["tgi_queue_size"].samples[0].value == 2
    assert text.endswith("\n\n")
    assert "\n\n\n" not in text
