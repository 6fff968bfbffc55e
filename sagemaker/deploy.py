"""Deploys the image to SageMaker, or prints the calls that would do it.

It must not know the server's insides: settings go through their own table, everything else is AWS's API.
"""

import argparse
import dataclasses
import datetime
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from deploy_arguments import USUAL_ROWS, argument_parser
from endpoint_facts import Facts, ami_of, cuda_version_of, ecr_address, has_gpu, size_in_s3
from endpoint_requests import Step, creation, replacement
from endpoint_senders import Clients, Sender, as_sent, sender, was_refused
from endpoint_watch import DeploymentFailed, hint, look_up, watch
from scaling_requests import alarms, scaling
from serving.errors import ConfigurationError
from serving.settings import Settings

MOST_VARIABLES = 100
MOST_BYTES = 1024
MOST_BYTES_OF_ALL = 32 * 1024
UNHURRIED = {"RESPONSE_DEADLINE": "0", "STREAM_DEADLINE": "0"}
OURS_ALONE = ("PORT", "WEIR_HOSTNAME")  # `serve` takes the port from SageMaker


def main(argv: Sequence[str]) -> int:
    """Deploy, or print; the exit code is 0 on success, 1 when the deployment failed, 2 for bad usage."""
    parser = argument_parser()
    options = parser.parse_args(argv)
    try:
        variables = environment(options.flags, options.env)
        if options.kind == "async":  # whose answers may take an hour, and whose container cannot know that
            variables = {**UNHURRIED, **variables}
        _check(options)
        if options.dry_run:
            facts = _said(options)
            _say_what_is_not_known(options, facts)
            print(json.dumps(as_sent(options.via, _steps(options, facts, variables), options.region), indent=2))
            return 0
        clients = Clients(options.region)
        chosen = sender(options.via, clients)
        steps = _steps(options, _found_out(options, clients), variables)
    except ConfigurationError as error:
        parser.error(str(error))
    return run(steps, chosen, clients, options)


def environment(flags: Sequence[str], assignments: Sequence[str]) -> dict[str, str]:
    """The container's variables: the server's flags by its own table, then `NAME=VALUE`. Raises ConfigurationError."""
    variables = Settings.resolve(flags, {}).environment()
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not (name and equals):
            raise ConfigurationError(f"--env {assignment}: write NAME=VALUE.")
        variables[name] = value
    for name, value in variables.items():
        if name in OURS_ALONE:
            raise ConfigurationError(f"{name} cannot be set: SageMaker chooses where the container listens.")
        if max(len(name.encode()), len(value.encode())) > MOST_BYTES:
            raise ConfigurationError(
                f"{name} is longer than SageMaker's {MOST_BYTES} bytes: put the value into a file beside the model and "
                "write @/opt/ml/model/NAME."
            )
    size = sum(len(name.encode()) + len(value.encode()) for name, value in variables.items())
    if len(variables) > MOST_VARIABLES or size > MOST_BYTES_OF_ALL:
        raise ConfigurationError(f"SageMaker takes {MOST_VARIABLES} variables and {MOST_BYTES_OF_ALL} bytes at most.")
    return variables


def run(steps: Sequence[Step], chosen: Sender, clients: Clients, options: argparse.Namespace) -> int:
    """Send the calls; returns the exit code. What a failure leaves behind is said, and how to remove it."""
    made: list[str] = []
    try:
        _send(steps, chosen, clients, options.poll, made)
    except DeploymentFailed as failure:
        print(failure, file=sys.stderr)
    except KeyboardInterrupt:
        print("\nInterrupted. What was begun goes on at AWS.", file=sys.stderr)
    except Exception as refusal:  # boto3's, or whatever an SDK makes of it
        advice = hint(f"{type(refusal).__name__} {refusal}")
        print(f"{type(refusal).__name__}: {refusal}" + (f"\nHint: {advice}" if advice else ""), file=sys.stderr)
    else:
        print(_how_to_ask(options))
        return 0
    _say_what_is_left(made, options)
    return 1


def _send(steps: Sequence[Step], chosen: Sender, clients: Clients, poll_s: float, made: list[str]) -> None:
    known: dict[str, str] = {}
    for step in steps:
        request = _filled(step.request, known)
        if step.until:
            watch(dataclasses.replace(step, request=request), chosen, clients, poll_s)
            continue
        print(f"{step.operation} ...", file=sys.stderr)
        made += [step.makes] if step.makes else []
        try:
            answer = chosen.send(step, request)
        except Exception as error:
            if step.makes and was_refused(error):
                made.remove(step.makes)
            raise
        known |= {text: str(look_up(answer, path)) for text, path in (step.gives or {}).items()}


def _filled(value: Any, known: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _filled(inner, known) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, known) for inner in value]
    return known.get(value, value) if isinstance(value, str) else value


def _steps(options: argparse.Namespace, facts: Facts, variables: Mapping[str, str]) -> list[Step]:
    owner = options.component if options.kind == "component" else options.name
    watching = (
        alarms(options.kind, owner, options.max_latency, options.max_first_token, options.alarm_topic)
        if options.alarms
        else []
    )
    scaled = scaling(options.kind, owner, options.autoscale, _target(options)) if options.autoscale else []
    if options.update:
        stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d%H%M%S")
        # Alarms and scaling belong to what was there before and is there afterwards.
        watching = [dataclasses.replace(step, makes=None) for step in watching]
        scaled = [dataclasses.replace(step, makes=None) for step in scaled]
        return [*watching, *replacement(options, facts, variables, stamp), *scaled]
    return [*creation(options, facts, variables), *scaled, *watching]


def _target(options: argparse.Namespace) -> float:
    if options.target:
        return float(options.target)
    if options.kind == "async":
        return 5
    rows = Settings.resolve(options.flags, {}).max_batch_size
    return max(1, rows * 3 // 4) if rows else USUAL_ROWS


def _check(options: argparse.Namespace) -> None:
    options.component = options.component or options.name
    if options.kind != "adapter" and not (options.image_uri and options.role_arn):
        raise ConfigurationError("--image-uri and --role-arn are needed.")
    if options.kind == "adapter" and (options.autoscale or options.alarms):
        raise ConfigurationError("An adapter scales with its component: --autoscale and --alarms belong there.")
    if options.kind == "realtime" and options.autoscale and options.autoscale[0] == 0:
        raise ConfigurationError("Only --kind async and --kind component scale to nothing: MIN must be 1 or more.")
    if options.autoscale and not options.wait:
        raise ConfigurationError("--autoscale needs what it scales in service: not with --no-wait.")
    if options.kind == "component" and not options.wait:
        raise ConfigurationError("A component needs its endpoint in service: not with --no-wait.")
    _check_via(options)


def _check_via(options: argparse.Namespace) -> None:
    if options.update and not options.wait:
        raise ConfigurationError("--update removes at the end what it replaced: not with --no-wait.")
    if options.via == "sdk2" and (options.kind in ("component", "adapter") or options.update):
        raise ConfigurationError(
            "SDK v2 makes real-time and asynchronous endpoints: use --via boto3 or sdk3 for others."
        )


def _said(options: argparse.Namespace) -> Facts:
    size = None if options.model_size is None else int(options.model_size * 1e9)
    if size is None and not (options.model_data or options.env or options.flags):
        size = 0  # the demo model
    return Facts(size, options.cuda_version)


def _needs_size(options: argparse.Namespace, facts: Facts) -> bool:
    return bool(facts.model_bytes is None and options.model_data)


def _needs_cuda(options: argparse.Namespace, facts: Facts) -> bool:
    return not (facts.cuda_version or options.ami or options.kind == "adapter") and has_gpu(options.instance_type)


def _say_what_is_not_known(options: argparse.Namespace, facts: Facts) -> None:
    if _needs_size(options, facts):
        print("Not asked in a dry run: the model's size in S3, for the timeouts (--model-size).", file=sys.stderr)
    if _needs_cuda(options, facts):
        print("Not asked in a dry run: the image's CUDA version in ECR (--cuda-version).", file=sys.stderr)


def _found_out(options: argparse.Namespace, clients: Clients) -> Facts:
    facts = _said(options)
    size, cuda = facts.model_bytes, facts.cuda_version
    if _needs_size(options, facts):
        try:
            size = size_in_s3(clients("s3"), options.model_data)
            print(f"{options.model_data}: {size / 1e9:.1f} GB", file=sys.stderr)
        except clients.refusals as refusal:
            print(
                f"The model's size is not known, so timeouts are usual ones (--model-size): {refusal}", file=sys.stderr
            )
    address = ecr_address(options.image_uri or "")
    if address and _needs_cuda(options, facts):
        try:
            cuda = cuda_version_of(clients("ecr", address["region"]), options.image_uri)
        except clients.refusals as refusal:
            print(f"The image's CUDA version is not known (--cuda-version): {refusal}", file=sys.stderr)
        print(f"{options.image_uri}: CUDA {cuda or 'not said'}, {ami_of(cuda, options.instance_type)}", file=sys.stderr)
    return Facts(size, cuda)


def _how_to_ask(options: argparse.Namespace) -> str:
    ask = f"python sagemaker/invoke.py --name {options.name}"
    if options.kind in ("component", "adapter"):
        ask += f" --component {options.adapter if options.kind == 'adapter' else options.component}"
    return ask + (" --async" if options.kind == "async" else "") + " 'Hello'"


def _say_what_is_left(made: Sequence[str], options: argparse.Namespace) -> None:
    if not made:
        print("Nothing was made.", file=sys.stderr)
        return
    print("There may be now:", *(f"  {thing}" for thing in made), sep="\n", file=sys.stderr)
    print("To remove it:", *(f"  {command}" for command in _how_to_remove(options)), sep="\n", file=sys.stderr)


def _how_to_remove(options: argparse.Namespace) -> list[str]:
    remove = f"python sagemaker/teardown.py --name {options.name}"
    remove += f" --region {options.region}" if options.region else ""
    if options.update:
        return [f"{remove} --unused"]
    if options.kind == "adapter":
        return [f"{remove} --component {options.adapter}"]
    own = [f"{remove} --component {options.component}"] if options.component != options.name else []
    return own if options.existing_endpoint else [*own, remove]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
