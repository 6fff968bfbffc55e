"""Waits for what is being made, says how it goes, and when it fails says why: the reason, the log's end, a hint.

It must not know what is made, or by whom.
"""

import sys
import time
from collections.abc import Mapping
from typing import Any

from endpoint_requests import Step
from endpoint_senders import Clients, Sender

LOG_LINES = 40
_SAY_AGAIN_S = 60
_SHOWS_WITHIN_S = 60
_FAILED = ("Failed", "OutOfService", "UpdateRollbackFailed")
_ENDS = ("InService", *_FAILED)
_HINTS = (
    (
        ("ping health check", "health check"),
        "The container did not answer /ping in time. If the log ends while the model is loading, give "
        "--startup-timeout; if it ends with an error, that is the cause.",
    ),
    (
        ("no log",),
        "A container that dies before its first line usually has an image whose CUDA does not fit the machine's "
        "driver: say --cuda-version or --ami.",
    ),
    (
        ("driver version is insufficient", "cuda driver", "no cuda gpus", "nvidia-smi"),
        "The machine's driver does not fit the image's CUDA: say --cuda-version or --ami.",
    ),
    (
        ("out of memory", "do not fit", "does not fit"),
        "The model is too large for the instance: `weir plan MODEL` lists types that fit.",
    ),
    (
        ("unable to provision", "insufficientinstancecapacity", "insufficient capacity"),
        "AWS has no such instance free now: another --instance-type, another region, or later.",
    ),
    (
        ("resourcelimitexceeded", "service limit", "quota"),
        "The account may not have so many of these instances: ask for a higher quota under Service Quotas, SageMaker.",
    ),
    (
        ("model data", "modeldata"),
        "The role that SageMaker takes on must be able to read the model: docs/iam/execution-role.json.",
    ),
    (
        ("accessdenied", "not authorized", "access denied"),
        "A permission is missing: docs/iam/deployer.json is for whoever runs this, docs/iam/execution-role.json for "
        "the role that SageMaker takes on.",
    ),
    (
        ("cannotstartcontainer", "exec format"),
        "The image does not start: it must be for linux/amd64 and have Weir's entry point.",
    ),
    (
        ("nocredentials", "unable to locate credentials"),
        "Log in first: aws configure, or name a profile in AWS_PROFILE.",
    ),
    (("noregion",), "Say where: --region eu-west-1."),
    (
        ("already exist",),
        "Something of that name is there: another --name, --update, or sagemaker/teardown.py.",
    ),
)


class DeploymentFailed(Exception):
    """It did not come into service; the text says all that is known."""


def watch(step: Step, sender: Sender, clients: Clients, poll_s: float) -> Mapping[str, Any]:
    """Repeat a call until its answer is as `step.until` says; returns that answer. Raises DeploymentFailed."""
    assert step.until is not None
    wanted = next(iter(step.until))
    subject = next(iter(step.request.values()))
    progress = _Progress(subject)
    has_moved = False
    while True:
        answer = sender.send(step, step.request)
        status = str(look_up(answer, wanted))
        elapsed_s = progress.say(status)
        fits = all(str(look_up(answer, path)) == value for path, value in step.until.items())
        # An update that was asked for a moment ago may not show yet.
        if fits or status in _FAILED or (status in _ENDS and (has_moved or elapsed_s >= _SHOWS_WITHIN_S)):
            break
        has_moved = has_moved or status not in _ENDS
        time.sleep(poll_s)
    progress.end()
    if fits:
        return answer
    raise DeploymentFailed(_diagnosis(subject, status, answer, step, clients))


def look_up(answer: Any, path: str) -> Any:
    """A member of an answer, by names and places with dots; None if there is none."""
    for part in path.split("."):
        if isinstance(answer, list):
            answer = answer[int(part)] if int(part) < len(answer) else None
        else:
            answer = (answer or {}).get(part)
    return answer


def hint(text: str) -> str | None:
    """What usually helps against a failure with these words; None for an unknown one."""
    lowered = text.lower()
    return next((advice for words, advice in _HINTS if any(word in lowered for word in words)), None)


def log_tail(clients: Clients, group: str) -> list[str]:
    """The last lines that any instance wrote, oldest first; none if there is no such log."""
    logs = clients("logs")
    try:
        streams = logs.describe_log_streams(logGroupName=group, orderBy="LastEventTime", descending=True, limit=1)
        if not streams["logStreams"]:
            return []
        name = streams["logStreams"][0]["logStreamName"]
        events = logs.get_log_events(logGroupName=group, logStreamName=name, limit=LOG_LINES, startFromHead=False)
    except clients.refusals:
        return []
    return [event["message"].rstrip("\n") for event in events["events"]]


def _diagnosis(subject: str, status: str, answer: Mapping[str, Any], step: Step, clients: Clients) -> str:
    kind = "InferenceComponents" if "component" in step.operation else "Endpoints"
    group = f"/aws/sagemaker/{kind}/{subject}"
    tail = log_tail(clients, group)
    reason = answer.get("FailureReason") or (
        "It was rolled back to what it was before." if status == "InService" else "SageMaker gives no reason."
    )
    lines = [f"{subject} is {status}: {reason}"]
    lines += [f"The end of the log {group}:", *(f"  {line}" for line in tail)] if tail else [f"No log in {group}."]
    # The container's own words tell more than SageMaker's.
    advice = [hint("\n".join(tail)) if tail else hint("no log"), hint(reason)]
    lines += [f"Hint: {text}" for text in dict.fromkeys(filter(None, advice))]
    return "\n".join(lines)


class _Progress:
    """A line on a terminal that counts; elsewhere a line for each change, and one a minute."""

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self._start = time.monotonic()
        self._said: tuple[str, int] | None = None
        self._is_terminal = sys.stderr.isatty()

    def say(self, status: str) -> int:
        elapsed = int(time.monotonic() - self._start)
        line = f"{self._subject}: {status}, {elapsed // 60}:{elapsed % 60:02d}"
        if self._is_terminal:
            print(f"\r{line:<78}", end="", file=sys.stderr, flush=True)
        elif self._said != (status, elapsed // _SAY_AGAIN_S):
            print(line, file=sys.stderr, flush=True)
        self._said = (status, elapsed // _SAY_AGAIN_S)
        return elapsed

    def end(self) -> None:
        if self._is_terminal:
            print(file=sys.stderr)
