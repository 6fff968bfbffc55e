"""`weir download-weights s3://...` against a server that speaks S3, through the real boto3."""

from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from serving.errors import ConfigurationError
from serving.weights.s3 import Prefix

TINY = {"config.json": b"{}", "tokenizer.json": b'{"a": 1}', "model.safetensors": b"weights"}
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


class Bucket:
    """One bucket, `models`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._client = boto3.client(
            "s3", endpoint_url=url, aws_access_key_id="key", aws_secret_access_key="secret", region_name="us-east-1"
        )
        self._client.create_bucket(Bucket="models")

    def put(self, prefix: str, files: dict[str, bytes]) -> None:
        for name, content in files.items():
            self._client.put_object(Bucket="models", Key=f"{prefix}{name}", Body=content)


@pytest.fixture
def bucket(caplog) -> Iterator[Bucket]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    bucket = Bucket("http://{}:{}".format(*server.get_host_and_port()))
    yield bucket
    bucket._client.close()
    server.stop()


@pytest.fixture
def download_s3(bucket, download):
    return lambda uri, *flags, **environ: download(uri, *flags, AWS_ENDPOINT_URL=bucket.url, **KEYS, **environ)


def test_only_the_files_that_serving_needs_are_fetched(bucket, download_s3):
    needed = {**TINY, "additional_chat_templates/rag.jinja": b"{{ documents }}"}
    bucket.put("a/tiny/", {**needed, "pytorch_model.bin": b"pickle", "logs/run.txt": b"", "checkpoint/": b""})
    bucket.put("a/tiny-other/", {"config.json": b"another model"})
    for uri in ("s3://models/a/tiny", "s3://models/a/tiny/"):
        done = download_s3(uri)
        assert done.files() == set(needed)
        assert (done.directory / "model.safetensors").read_bytes() == b"weights"
    bucket.put("", TINY)
    assert download_s3("s3://models").files() == set(TINY)


def test_what_is_here_is_not_fetched_again_and_what_changed_is(bucket, download_s3):
    bucket.put("tiny/", TINY)
    first = download_s3("s3://models/tiny")
    again = download_s3("s3://models/tiny")
    assert again.directory == first.directory
    assert not any("Downloading" in line["message"] for line in again.lines)
    bucket.put("tiny/", {"config.json": b'{"new": 1}'})
    changed = download_s3("s3://models/tiny")
    told = [line["message"] for line in changed.lines if "Downloading" in line["message"]]
    assert len(told) == 1, "the weights stayed as they were"
    assert told[0].endswith("in files: 1")
    assert (changed.directory / "config.json").read_bytes() == b'{"new": 1}'
    assert (first.directory / "config.json").read_bytes() == b"{}"
    assert (first.directory / "model.safetensors").samefile(changed.directory / "model.safetensors")


def test_refusals_say_what_to_do(bucket, download_s3):
    bucket.put("data/", {"train.csv": b"1"})
    bucket.put("old/", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    assert "s3://models/data holds no config.json" in download_s3("s3://models/data").error
    assert "`weir convert`" in download_s3("s3://models/old").error
    assert "s3:GetObject" in (error := download_s3("s3://elsewhere/tiny").error)
    assert "NoSuchBucket" in error


def test_without_credentials_it_is_said(bucket, download):
    error = download("s3://models/tiny", AWS_ENDPOINT_URL=bucket.url, AWS_EC2_METADATA_DISABLED="true").error
    assert "credentials" in error.lower()


def test_a_missing_boto3_names_the_extra(download, tmp_path):
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "boto3.py").write_text("raise ModuleNotFoundError('No module named boto3')")
    error = download("s3://models/tiny", PYTHONPATH=str(tmp_path / "hidden")).error
    assert "weir-serving[sagemaker]" in error


def test_a_file_that_comes_short_is_not_kept(bucket, tmp_path):
    bucket.put("tiny/", TINY)

    class Short:
        def __getattr__(self, name):
            return getattr(bucket._client, name)

        def download_file(self, bucket, key, path, **options):
            Path(path).write_bytes(b"w")

    prefix = Prefix("s3://models/tiny", Short(), tmp_path)
    with pytest.raises(ConfigurationError, match=r"model.safetensors came with 1 bytes instead of 7"):
        prefix.fetch(["model.safetensors"])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["../../../x.jinja", "a/../../x.jinja"])
def test_no_link_is_made_outside_of_the_models_directory(bucket, tmp_path, name):
    bucket.put("tiny/", {**TINY, name: b"{{ stray }}"})
    prefix = Prefix("s3://models/tiny", bucket._client, tmp_path / "cache")
    with pytest.raises(ConfigurationError, match="lies outside of the model"):
        prefix.fetch([name])
    assert not [path for path in tmp_path.rglob("*") if path.is_symlink()]


def test_an_adapter_for_requests_is_fetched_alone(bucket, download_s3):
    adapter = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"small"}
    bucket.put("tiny/", TINY)
    bucket.put("french/", {**adapter, **TINY, "optimizer.pt": b""})
    done = download_s3("s3://models/tiny", "--lora-adapters=french=s3://models/french/")
    fetched = Path(done.lines[-1]["adapters"]["french"])
    assert {path.name for path in fetched.iterdir()} == set(adapter)
    assert done.files() == set(TINY)
