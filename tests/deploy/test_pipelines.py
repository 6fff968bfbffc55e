"""buildspec.yml, the workflow, the scripts and the manifests: they parse, and what they call exists."""

import json
import os
import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RULES = re.findall(r"^([a-z -]+?)(?:: image-%)?:", (ROOT / "Makefile").read_text(), re.M)
TARGETS = {name for rule in RULES for name in rule.split()}


def buildspec():
    return yaml.safe_load((ROOT / "buildspec.yml").read_text())


def workflow_steps():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    return [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]


def commands():
    return [command for phase in buildspec()["phases"].values() for command in phase["commands"]] + workflow_steps()


def test_the_buildspec_has_the_phases_of_a_gated_release_in_their_order():
    spec = buildspec()
    assert spec["version"] == 0.2
    assert list(spec["phases"]) == ["install", "pre_build", "build", "post_build"]
    joined = "\n".join(command for phase in spec["phases"].values() for command in phase["commands"])
    # What publishing is, and in which order, is test_publish_image.py's matter.
    steps = ["make setup", "make check", "make image-cpu", "make test", "image-$kind", "make smoke-image",
             "scripts/publish_image.sh", "imageDetail.json"]  # fmt: skip
    places = [joined.index(step) for step in steps]
    assert places == sorted(places)
    assert spec["phases"]["post_build"]["commands"][0] == 'test "$CODEBUILD_BUILD_SUCCEEDING" = 1'


def test_every_kind_is_built_tried_weighed_and_published():
    spec = buildspec()
    everything = [command for phase in spec["phases"].values() for command in phase["commands"]]
    loops = [command for command in everything if command.startswith("for kind in $KINDS; do ")]
    assert all(loop.endswith(" || exit 1; done") for loop in loops), "the first failure ends it"
    build, smoke, publish = loops
    assert 'make "image-$kind"' in build
    assert "--json size-$kind.json" in build
    assert 'KIND="$kind"' in smoke
    assert 'scripts/publish_image.sh "$kind"' in publish
    made = ["imageDetail.json", "imageDetail-cuda.json", "findings-rocm.json", "size-cuda.json"]
    assert all(any(fnmatch(name, pattern) for pattern in spec["artifacts"]["files"]) for name in made)


@pytest.mark.parametrize("command", commands())
def test_every_command_is_good_shell_and_calls_what_exists(command):
    subprocess.run(["bash", "-n", "-c", command], check=True)
    for target in re.findall(r"\bmake ([a-z-]+)", command):
        assert target in TARGETS
    for script in re.findall(r"\bscripts/[\w/.]+", command):
        assert os.access(ROOT / script, os.X_OK)


@pytest.mark.parametrize("script", sorted([*ROOT.glob("scripts/*.sh"), ROOT / ".ci/run"]), ids=lambda path: path.name)
def test_every_script_is_good_shell_and_stops_at_the_first_failure(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert "set -euo pipefail" in script.read_text()
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("path", sorted((ROOT / "docs/deploy").glob("*.yaml")), ids=lambda path: path.name)
def test_manifests_parse_and_the_files_they_mount_exist(path):
    documents = list(yaml.safe_load_all(path.read_text()))
    assert all(isinstance(document, dict) for document in documents)
    for mounted in re.findall(r"(\.\.?/[\w./-]+):/", path.read_text()):
        assert (path.parent / mounted).exists()


def test_a_pod_outlives_the_servers_drain():
    (deployment, _) = yaml.safe_load_all((ROOT / "docs/deploy/kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > 90  # what the server waits for running requests
    probe = pod["containers"][0]["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 1800


def test_the_dashboard_that_grafana_is_given_is_one():
    assert json.loads((ROOT / "docs/grafana/weir.json").read_text())["panels"]
