"""What is found out before a deployment: the model's size in S3 and the CUDA version of the image, and what follows.

It must not know what is deployed, or how.
"""

import dataclasses
import json
import math
import re
import urllib.request
from typing import Any

from serving.errors import ConfigurationError

CUDA_LABEL = "com.amazonaws.sagemaker.inference.cuda.verified_versions"
AMIS = {"12": "al2-ami-sagemaker-inference-gpu-3-1", "13": "al2023-ami-sagemaker-inference-gpu-4-1"}
NEWEST_CUDA = "13"
RULE = f"""\
Timeouts follow from the model's size, which is listed in S3 or said with --model-size: the copy from S3 gets 300 s and
1 s for every 50 MB, loading and warming up 300 s and 1 s for every 100 MB, each at most 3600 s; a model that does not
come from S3 is fetched while the start-up clock runs, so that clock gets both. Where the size is not known, 1800 s and
900 s. The machine image follows from the image's CUDA version, its label {CUDA_LABEL}: 12 needs
{AMIS["12"]}, 13 needs {AMIS["13"]}.
"""
_UNKNOWN = (900, 1800)
_LONGEST = 3600
_ECR = re.compile(
    r"(?P<registry>\d{12})\.dkr\.ecr\.(?P<region>[\w-]+)\.amazonaws\.com(?:\.cn)?/(?P<repository>[^:@]+)"
    r"(?::(?P<tag>[^@]+))?(?:@(?P<digest>sha256:[0-9a-f]+))?"
)
_MANIFESTS = [
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.index.v1+json",
]


@dataclasses.dataclass(frozen=True)
class Facts:
    """None: not known.

    Attributes:
        model_bytes: size of the model's files.
        cuda_version: such as "13.0".
    """

    model_bytes: int | None = None
    cuda_version: str | None = None


def timeouts(model_bytes: int | None, in_s3: bool) -> tuple[int, int]:
    """Seconds for start-up and for the copy from S3; the rule is `RULE`."""
    if model_bytes is None:
        return _UNKNOWN
    load, copy = math.ceil(model_bytes / 100e6), math.ceil(model_bytes / 50e6)
    return min(300 + load + (0 if in_s3 else copy), _LONGEST), min(300 + copy, _LONGEST)


def has_gpu(instance_type: str) -> bool:
    """Whether SageMaker's type has NVIDIA GPUs."""
    return instance_type.removeprefix("ml.").startswith(("g", "p"))


def ami_of(cuda_version: str | None, instance_type: str) -> str | None:
    """The InferenceAmiVersion whose driver fits; None without a GPU. Raises ConfigurationError."""
    if not has_gpu(instance_type):
        return None
    major = (cuda_version or NEWEST_CUDA).partition(".")[0]
    if major not in AMIS:
        raise ConfigurationError(f"No machine image is known for CUDA {cuda_version}: name it with --ami.")
    return AMIS[major]


def size_in_s3(s3: Any, uri: str) -> int:
    """Bytes below a prefix, or of an archive. Raises ConfigurationError for what would fail the deployment."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key)
    objects = [entry for page in pages for entry in page.get("Contents", ())]
    if not uri.endswith("/"):
        objects = [entry for entry in objects if entry["Key"] == key]
    if not objects:
        raise ConfigurationError(f"There is nothing at {uri}: copy the model there (aws s3 sync MODEL {uri}).")
    folders = [entry["Key"] for entry in objects if entry["Key"].endswith("/")]
    if folders:
        raise ConfigurationError(
            f"s3://{bucket}/{folders[0]} is an empty object that stands for a folder, at which SageMaker fails: "
            f"aws s3api delete-object --bucket {bucket} --key {folders[0]}"
        )
    return sum(entry["Size"] for entry in objects)


def cuda_version_of(ecr: Any, image_uri: str) -> str | None:
    """What the image's label says; None where it has none. `ecr` is a client in the image's region."""
    image = ecr_address(image_uri)
    if image is None:
        return None
    place = {"registryId": image["registry"], "repositoryName": image["repository"]}
    chosen = {"imageDigest": image["digest"]} if image["digest"] else {"imageTag": image["tag"] or "latest"}
    found = ecr.batch_get_image(**place, imageIds=[chosen], acceptedMediaTypes=_MANIFESTS)["images"]
    if not found:
        raise ConfigurationError(f"{image_uri} is not in ECR: push it first, or mend the tag.")
    manifest = json.loads(found[0]["imageManifest"])
    if "config" not in manifest:
        raise ConfigurationError(
            f"{image_uri} is a list of images, which SageMaker refuses: push it for one platform, with "
            "--provenance=false."
        )
    link = ecr.get_download_url_for_layer(**place, layerDigest=manifest["config"]["digest"])["downloadUrl"]
    with urllib.request.urlopen(link, timeout=30) as answer:
        labels = json.load(answer).get("config", {}).get("Labels") or {}
    versions = re.findall(r"\d+(?:\.\d+)*", labels.get(CUDA_LABEL, ""))
    return max(versions, key=lambda version: [int(part) for part in version.split(".")], default=None)


def ecr_address(image_uri: str) -> dict[str, str | None] | None:
    """Registry, region, repository, tag and digest of an image in ECR; None if it is elsewhere."""
    match = _ECR.fullmatch(image_uri)
    return match.groupdict() if match else None
