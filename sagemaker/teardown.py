"""Removes an endpoint with everything that deploy.py made for it, or one of its components.

It must not know how they were made: it looks at what is there.
"""

import argparse
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from endpoint_requests import Step
from endpoint_senders import Clients
from scaling_requests import ALARM_SUFFIXES
from serving.errors import ConfigurationError

DESCRIPTION = """\
Remove an endpoint and what belongs to it: scaling policies, alarms, adapter components, components, the endpoint, its
configurations and models. What is there is looked up, listed, and removed after a question. It can be repeated: what
is gone already is passed over.

What stays: the image, the model in S3, answers of an asynchronous endpoint in S3, and without --logs the logs.
"""
_GONE = ("could not find", "does not exist", "not found", "cannot find", "no scaling policy", "no scalable target")


def main(argv: Sequence[str]) -> int:
    """Remove; the exit code is 0 when nothing is left, 1 when something is, 2 for bad usage."""
    parser = argument_parser()
    options = parser.parse_args(argv)
    try:
        clients = Clients(options.region)
    except ConfigurationError as error:
        parser.error(str(error))
    try:
        return _remove(clients, options)
    except clients.refusals as refusal:
        print(f"{type(refusal).__name__}: {refusal}", file=sys.stderr)
        return 1


def argument_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="weir", help="of the endpoint (%(default)s)")
    parser.add_argument("--component", help="only this component or adapter, and the adapters on it")
    parser.add_argument("--unused", action="store_true", help="only configurations and models that are not in use")
    parser.add_argument("--logs", action="store_true", help="the logs too")
    parser.add_argument("--region", help="AWS region (boto3's default)")
    parser.add_argument("--poll", type=float, default=10, metavar="SECONDS", help="how often to look (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="look, list, and remove nothing")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    return parser


def _remove(clients: Clients, options: argparse.Namespace) -> int:
    steps = Deployed(clients, options.name).removals(options.component, options.unused, options.logs)
    if not steps:
        print(f"There is nothing of {options.component or options.name}.")
        return 0
    for step in steps:
        print(f"{step.operation} {_subject(step)}")
    if options.dry_run or not (options.yes or _agrees()):
        print("Nothing was removed.")
        return 0 if options.dry_run else 1
    for step in steps:
        print(f"{step.operation} {_subject(step)} ...", file=sys.stderr)
        call(clients, step)
        if step.until is not None and not _waited_until_gone(clients, step, options.poll):
            return 1
    print("Removed." if options.logs else "Removed. Logs, if any, stay: --logs removes them too.")
    return 0


class Deployed:
    """What is there of an endpoint."""

    def __init__(self, clients: Clients, name: str) -> None:
        self._clients = clients
        self._name = name
        self._endpoint = call(clients, Step("sagemaker", "describe_endpoint", {"EndpointName": name}))
        self._components = list(self._find_components()) if self._endpoint else []

    def removals(self, only: str | None, unused: bool, logs: bool) -> list[Step]:
        """The calls, in an order in which nothing that is removed is needed by something that is there."""
        if unused:
            return self._unused()
        chosen = [found for found in self._components if only in (None, found["InferenceComponentName"], found["base"])]
        chosen.sort(key=lambda found: found["base"] is None)  # adapters first
        names = [found["InferenceComponentName"] for found in chosen]
        steps = [step for name in names for step in self._watchers(name, f"inference-component/{name}")]
        if only is None:
            steps += self._endpoint_watchers(already=names)
        steps += [_removal("inference_component", "InferenceComponentName", name) for name in names]
        models = dict.fromkeys(found["model"] for found in chosen if found["model"])
        models |= dict.fromkeys(self._model_names(only) if only else ())
        if only is None:
            steps += [_removal("endpoint", "EndpointName", self._name)] if self._endpoint else []
            steps += [_removal("endpoint_config", "EndpointConfigName", config) for config in self._configs()]
            models |= dict.fromkeys(self._models())
        steps += [_removal("model", "ModelName", model) for model in models if self._is_there(model)]
        return steps + (self._logs(only, names) if logs else [])

    def _find_components(self) -> Iterator[dict[str, Any]]:
        sagemaker = self._clients("sagemaker")
        for page in sagemaker.get_paginator("list_inference_components").paginate(EndpointNameEquals=self._name):
            for summary in page["InferenceComponents"]:
                name = {"InferenceComponentName": summary["InferenceComponentName"]}
                found = call(self._clients, Step("sagemaker", "describe_inference_component", name))
                if found:
                    specification = found.get("Specification", {})
                    base = specification.get("BaseInferenceComponentName")
                    yield name | {"base": base, "model": specification.get("ModelName")}

    def _unused(self) -> list[Step]:
        used = {(self._endpoint or {}).get("EndpointConfigName")}
        used_models = {found["model"] for found in self._components}
        steps = []
        for config in self._configs():
            if config in used:
                used_models |= set(self._models_of(config))
            else:
                steps.append(_removal("endpoint_config", "EndpointConfigName", config))
        return steps + [_removal("model", "ModelName", model) for model in self._models() if model not in used_models]

    def _endpoint_watchers(self, already: Sequence[str]) -> list[Step]:
        variants = (self._endpoint or {}).get("ProductionVariants") or [{"VariantName": "AllTraffic"}]
        steps = []
        for variant in variants:
            steps += self._scaling(f"endpoint/{self._name}/variant/{variant['VariantName']}")
        return steps + ([] if self._name in already else self._alarms(self._name))

    def _watchers(self, name: str, resource: str) -> list[Step]:
        return self._scaling(resource) + self._alarms(name)

    def _scaling(self, resource: str) -> list[Step]:
        subject = {"ServiceNamespace": "sagemaker", "ResourceId": resource}
        scaling = self._clients("application-autoscaling")
        steps = []
        for policy in scaling.describe_scaling_policies(**subject)["ScalingPolicies"]:
            request = {key: policy[key] for key in ("PolicyName", *subject, "ScalableDimension")}
            steps.append(Step("application-autoscaling", "delete_scaling_policy", request))
        targets = scaling.describe_scalable_targets(ServiceNamespace="sagemaker", ResourceIds=[resource])
        for target in targets["ScalableTargets"]:
            request = {key: target[key] for key in (*subject, "ScalableDimension")}
            steps.append(Step("application-autoscaling", "deregister_scalable_target", request))
        return steps

    def _alarms(self, name: str) -> list[Step]:
        names = [f"{name}-{suffix}" for suffix in ALARM_SUFFIXES]
        found = self._clients("cloudwatch").describe_alarms(AlarmNames=names)["MetricAlarms"]
        there = [alarm["AlarmName"] for alarm in found]
        return [Step("cloudwatch", "delete_alarms", {"AlarmNames": there})] if there else []

    def _configs(self) -> list[str]:
        named = self._named("list_endpoint_configs", "EndpointConfigs", "EndpointConfigName", self._name)
        used = (self._endpoint or {}).get("EndpointConfigName")
        return list(dict.fromkeys([*([used] if used else []), *named]))

    def _models(self) -> list[str]:
        of_configs = [model for config in self._configs() for model in self._models_of(config)]
        owners = [self._name, *(found["InferenceComponentName"] for found in self._components)]
        named = [model for owner in owners for model in self._model_names(owner)]
        return list(dict.fromkeys([*of_configs, *named]))

    def _models_of(self, config: str) -> list[str]:
        found = call(self._clients, Step("sagemaker", "describe_endpoint_config", {"EndpointConfigName": config}))
        return [
            variant["ModelName"] for variant in (found or {}).get("ProductionVariants", ()) if "ModelName" in variant
        ]

    def _model_names(self, owner: str) -> list[str]:
        return self._named("list_models", "Models", "ModelName", owner)

    def _named(self, operation: str, member: str, key: str, name: str) -> list[str]:
        """deploy.py calls them like the endpoint or the component, after an update with the time behind it."""
        pages = self._clients("sagemaker").get_paginator(operation).paginate(NameContains=name)
        found = [entry[key] for page in pages for entry in page[member]]
        return [each for each in found if re.fullmatch(rf"{re.escape(name)}(-\d{{14}})?", each)]

    def _is_there(self, model: str) -> bool:
        return call(self._clients, Step("sagemaker", "describe_model", {"ModelName": model})) is not None

    def _logs(self, only: str | None, components: Sequence[str]) -> list[Step]:
        groups = [f"/aws/sagemaker/InferenceComponents/{name}" for name in components]
        groups += [] if only else [f"/aws/sagemaker/Endpoints/{self._name}"]
        logs = self._clients("logs")
        steps = []
        for group in groups:
            found = logs.describe_log_groups(logGroupNamePrefix=group)["logGroups"]
            if any(entry["logGroupName"] == group for entry in found):
                steps.append(Step("logs", "delete_log_group", {"logGroupName": group}))
        return steps


def call(clients: Clients, step: Step) -> dict[str, Any] | None:
    """The answer; None where what it asks for is not there. Raises boto3's errors."""
    try:
        answer: dict[str, Any] = getattr(clients(step.service), step.operation)(**step.request)
    except clients.refusals as refusal:
        if any(words in str(refusal).lower() for words in _GONE):
            return None
        raise
    return answer


def _removal(noun: str, key: str, name: str) -> Step:
    """Endpoints and components take a while, and what they use must stay until they are gone."""
    takes_long = noun in ("endpoint", "inference_component")
    return Step("sagemaker", f"delete_{noun}", {key: name}, until={} if takes_long else None)


def _waited_until_gone(clients: Clients, step: Step, poll_s: float) -> bool:
    describe = Step(step.service, step.operation.replace("delete_", "describe_"), step.request)
    was_going = False
    while (answer := call(clients, describe)) is not None:
        status = answer.get("EndpointStatus") or answer.get("InferenceComponentStatus")
        print(f"{_subject(step)}: {status}", file=sys.stderr)
        if was_going and status == "Failed":
            print(f"It could not be removed: {answer.get('FailureReason')}\nRepeat this later.", file=sys.stderr)
            return False
        was_going = was_going or status == "Deleting"
        time.sleep(poll_s)
    return True


def _subject(step: Step) -> str:
    values = list(step.request.values())
    shown = step.request.get("PolicyName") or step.request.get("ResourceId") or values[0]
    return ", ".join(shown) if isinstance(shown, list) else str(shown)


def _agrees() -> bool:
    try:
        return input("Remove all of this? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        print("\nNobody to ask: say --yes.", file=sys.stderr)
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
