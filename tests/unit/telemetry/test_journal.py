"""The journal: one line and one trace a request, written by a thread that nobody waits for."""

import json
import logging
import threading

import pytest

from serving.protocol import Finish, FinishReason, FirstToken, SamplingParams
from serving.telemetry import journal, logs
from serving.telemetry.journal import GenerationRecord, Journal, RequestRecord

pytestmark = pytest.mark.usefixtures("logging_restored")

TRACE = "0af7651916cd43dd8448eb211c80319c"


def finish(*, queue_s=0.5, inference_s=2.0, tokens=4) -> Finish:
    return Finish(
        reason=FinishReason.LENGTH,
        text="never logged",
        generated_tokens=tokens,
        queue_s=queue_s,
        inference_s=inference_s,
    )


def generation(*, ended=True, seeds=(7,)) -> GenerationRecord:
    record = GenerationRecord(arrived=100.0, stream=False, validated=100.25, input_length=3, max_new_tokens=4)
    record.sampling = SamplingParams(do_sample=True, seed=7)
    record.seeds = list(seeds)
    record.generated_tokens = 4
    record.begin(0, FirstToken(arrived=100.25, begun=100.75, reached=101.0))
    if ended:
        record.end(0, finish())
    return record


def request(*generations: GenerationRecord, status=200, **changes) -> RequestRecord:
    usual = {"handler": "generate", "method": "POST", "route": "/generate", "request_id": "r1", "model": "m"}
    record = RequestRecord(**{**usual, **changes}, arrived=100.0, arrived_ns=10**18)
    record.generations += generations
    record.status = status
    record.ended = 103.0
    return record


class Tracer:
    def __init__(self) -> None:
        self.records = []
        self.threads = []
        self.closed = False

    def trace(self, record: RequestRecord) -> str:
        self.records.append(record)
        self.threads.append(threading.current_thread().name)
        return "ab" * 16

    def close(self) -> None:
        self.closed = True


def test_a_request_is_one_line_of_json_with_times_in_seconds(capsys):
    logs.configure("info", json_output=True)
    made = Journal()
    made.add(request(generation()))
    made.close()
    line = json.loads(capsys.readouterr().out)
    del line["timestamp"]
    assert line == {
        "level": "INFO",
        "message": "Success",
        "target": "serving.telemetry.journal",
        "handler": "generate",
        "status": 200,
        "total_time": 3.0,
        "validation_time": 0.25,
        "queue_time": 0.5,
        "inference_time": 2.0,
        "time_per_token": 0.5,
        "seed": 7,
        "prompt_tokens": 3,
        "generated_tokens": 4,
        "request_id": "r1",
    }


def test_a_request_is_one_line_of_text(capsys):
    logs.configure("info", json_output=False)
    made = Journal()
    made.add(request(generation(), request_id='a" status=500'))
    made.close()
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert line.endswith(' generated_tokens=4 request_id="a\\" status=500"\n')  # no field of its own
    assert " INFO serving.telemetry.journal: Success handler=generate status=200 total_time=3.0 " in line


@pytest.mark.parametrize(
    ("record", "error", "level"),
    [
        (request(generation(ended=False)), "dropped", "INFO"),
        (request(GenerationRecord(arrived=100.0, stream=True, error="validation"), status=422), "validation", "INFO"),
        (request(GenerationRecord(arrived=100.0, stream=True, error="generation")), "generation", "WARN"),
        (request(status=415), "415", "INFO"),
        (request(status=503), "503", "WARN"),
        (request(status=500), "500", "WARN"),
    ],
)
def test_a_failure_says_why_and_whose_fault_it_was(capsys, record, error, level):
    logs.configure("info", json_output=True)
    made = Journal()
    made.add(record)
    made.close()
    line = json.loads(capsys.readouterr().out)
    assert (line["message"], line["error"], line["level"]) == ("Failure", error, level)


def test_a_half_answered_request_tells_what_it_came_to():
    fields = request(generation(ended=False)).fields()
    assert fields["generated_tokens"] == 4
    assert fields["queue_time"] == 0.5
    assert "inference_time" not in fields


def test_a_failed_part_of_a_request_counts_before_its_dropped_siblings():
    failed = generation(ended=False)
    failed.error = "validation"
    assert request(generation(ended=False), failed, status=422).error == "validation"


def test_of_several_answers_the_slowest_counts_and_all_their_tokens():
    several = generation(seeds=(7, 8))
    several.begin(1, FirstToken(arrived=100.25, begun=101.25, reached=102.0))
    several.end(1, finish(queue_s=1.0, inference_s=1.0))
    fields = request(several).fields()
    assert (fields["queue_time"], fields["inference_time"], fields["seed"]) == (1.0, 2.0, [7, 8])


@pytest.mark.parametrize(
    ("traceparent", "trace_id"),
    [
        (f"00-{TRACE}-b7ad6b7169203331-00", TRACE),
        (f"01-{TRACE}-b7ad6b7169203331-00-more", TRACE),
        (f"ff-{TRACE}-b7ad6b7169203331-00", None),
        (f"00-{'0' * 32}-b7ad6b7169203331-00", None),
        (f"00-{TRACE}-{'0' * 16}-00", None),
        ("00-nonsense", None),
        ("", None),
    ],
)
def test_without_a_tracer_the_line_has_the_clients_trace(capsys, traceparent, trace_id):
    logs.configure("info", json_output=True)
    made = Journal()
    made.add(request(traceparent=traceparent))
    made.close()
    assert json.loads(capsys.readouterr().out).get("trace_id") == trace_id


def test_tracing_happens_in_the_journals_thread_and_ends_with_it(capsys):
    logs.configure("warn", json_output=True)  # traces do not depend on the level of logs
    tracer = Tracer()
    made = Journal(lambda: tracer)
    record = request(generation())
    made.add(record)
    made.close()
    assert tracer.records == [record]
    assert tracer.threads == ["journal"]
    assert tracer.closed
    assert capsys.readouterr().out == ""


def test_a_tracer_that_cannot_be_made_leaves_the_log(capsys):
    def broken():
        raise RuntimeError("no such collector")

    logs.configure("info", json_output=False)
    made = Journal(broken)
    made.add(request())
    made.close()
    text = capsys.readouterr().out
    assert "traces cannot be sent" in text
    assert "Success handler=generate" in text


def test_a_record_that_cannot_be_written_does_not_end_the_journal(capsys):
    class Broken(Tracer):
        def trace(self, record: RequestRecord) -> str:
            if not self.records:
                self.records.append(record)
                raise RuntimeError("this one")
            return super().trace(record)

    logs.configure("info", json_output=False)
    made = Journal(Broken)
    made.add(request())
    made.add(request(request_id="second"))
    made.close()
    assert "request_id=second" in capsys.readouterr().out


def test_nobody_waits_for_a_log_that_is_not_read(monkeypatch, capsys):
    logs.configure("info", json_output=False)
    monkeypatch.setattr(journal, "CAPACITY", 2)
    entered, gate = threading.Event(), threading.Event()

    class Slow(Tracer):
        def trace(self, record: RequestRecord) -> str:
            entered.set()
            gate.wait(10)
            return super().trace(record)

    made = Journal(Slow)
    made.add(request(request_id="written"))
    assert entered.wait(10)
    for number in range(5):
        made.add(request(request_id=f"r{number}"))
    gate.set()
    made.close()
    text = capsys.readouterr().out
    assert [f"request_id=r{number}" in text for number in range(5)] == [True, True, False, False, False]
    assert "3 requests were not logged" in text


def test_closing_waits_no_longer_than_told(capsys):
    gate = threading.Event()

    class Stuck(Tracer):
        def close(self) -> None:
            gate.wait(10)

    made = Journal(Stuck)
    made.close(0.05)
    assert made._thread.is_alive()
    gate.set()
    made.close(10)
    assert not made._thread.is_alive()


def test_a_server_that_logs_warnings_alone_tells_of_its_own_faults(capsys):
    logs.configure("warn", json_output=True)
    made = Journal()
    made.add(request(generation()))
    made.add(request(status=503))
    made.close()
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["error"] == "503"


def test_a_quiet_server_keeps_no_records():
    logging.getLogger("serving").setLevel(logging.ERROR)
    made = Journal()
    made.add(request())
    assert made._inbox.empty()
    made.close()
