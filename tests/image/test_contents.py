"""What is in the image, and what is not: looked at from inside, by its own Python."""

import json
import subprocess

import pytest
from packaging.utils import canonicalize_name

from scripts.image_report import main
from scripts.lock_requirements import path

LABELS = {
    "com.amazonaws.sagemaker.capabilities.accept-bind-to-port": "true",
    "com.amazonaws.sagemaker.capabilities.multi-models": "false",
    "org.opencontainers.image.title": "weir",
}
LOOK = """\
import importlib.metadata, json, os
found = {"weights": [], "secrets": [], "stray": []}
for root, directories, files in os.walk("/"):
    if root == "/":
        directories[:] = set(directories) - {"proc", "sys", "dev"}
    for name in files:
        path = os.path.join(root, name)
        if name.endswith((".safetensors", ".gguf", ".pt", ".ckpt")) or name.startswith("pytorch_model"):
            found["weights"].append(path)
        if name in ("pip.conf", ".netrc", "ca_bundle.pem", "credentials") or path.startswith("/run/secrets"):
            found["secrets"].append(path)
for place in ("/tmp", "/src", "/wheels", "/wheelhouse", "/server", "/kernels", "/compat", "/root/.cache"):
    if os.path.isdir(place):
        found["stray"] += [os.path.join(place, name) for name in os.listdir(place)]
found["packages"] = {one.name: one.version for one in importlib.metadata.distributions()}
found["data_mode"] = oct(os.stat("/data").st_mode)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(engine, image):
    command = [engine, "run", "--rm", "--network=none", image, "python", "-c", LOOK]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.image
def test_no_weights_but_the_demo_models_are_inside(found):
    weights = [path for path in found["weights"] if "/torch/bin/" not in path]  # what torch tests itself with
    assert [path.partition("/serving/")[2] for path in weights] == ["demo_model/model.safetensors"]


@pytest.mark.image
def test_what_the_build_was_lent_is_not_inside(found):
    assert found["secrets"] == []
    assert found["stray"] == []


@pytest.mark.image
def test_the_packages_are_those_of_the_lock(found, image):
    lock = path(image.rpartition(":")[2]).read_text().splitlines()
    pinned = dict(line.split("==") for line in lock if line and not line.startswith("#"))
    there = {canonicalize_name(name): version.partition("+")[0] for name, version in found["packages"].items()}
    assert {name: there.get(name) for name in pinned} == pinned
    assert there.keys() - pinned.keys() == {"pip", "weir-serving"}


@pytest.mark.image
def test_any_user_may_keep_downloads(found):
    assert found["data_mode"].endswith("1777")


@pytest.mark.image
def test_its_labels_say_what_sagemaker_asks(engine, image):
    asked = [engine, "image", "inspect", "--format={{json .Config.Labels}}", image]
    labels = json.loads(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)
    assert labels.items() >= LABELS.items()
    cuda = labels["com.amazonaws.sagemaker.inference.cuda.verified_versions"]
    assert cuda == ("13.0" if image.endswith("cuda") else "")


@pytest.mark.image
def test_it_weighs_no_more_than_its_kind_may(engine, image, capsys):
    assert main([image, "--engine", engine]) == 0
    assert "COPY /opt/weir /opt/weir" in capsys.readouterr().out
