"""`weir download-weights` against a hub: what is fetched, what is not fetched again, and what is said when it fails."""

import json
import os
from pathlib import Path

import pytest
from hub_server import TOKEN

from serving.weights.hub import remove_abandoned

TINY = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"weights"}
SHARDS = {"model-00001-of-00002.safetensors": b"one", "model-00002-of-00002.safetensors": b"two"}
INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})


def test_only_the_files_that_serving_needs_are_fetched(hub, download):
    needed = {
        **TINY,
        "generation_config.json": b"{}",
        "tokenizer_config.json": b"{}",
        "special_tokens_map.json": b"{}",
        "tokenizer.model": b"sp",
        "merges.txt": b"",
        "chat_template.jinja": b"{{ messages }}",
        "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
    }
    others = ("README.md", "pytorch_model.bin", "model.gguf", "consolidated.safetensors", "original/params.json",
              "original/consolidated.00.pth", "onnx/model.onnx", "onnx/config.json", "training_args.bin",
              "pytorch_model.bin.index.json", "tf_model.h5", "images/a.png")  # fmt: skip
    hub.add("org/tiny", {**needed, **dict.fromkeys(others, b"unneeded")})
    assert download("org/tiny").files() == set(needed)


def test_of_weights_that_lie_there_twice_those_of_the_index_are_fetched(hub, download):
    hub.add(
        "org/big",
        {
            "config.json": b"{}",
            "model.safetensors.index.json": INDEX.encode(),
            **SHARDS,
            "model.safetensors": b"all of it once more",
            "consolidated.00.safetensors": b"and again",
        },
    )
    assert download("org/big").files() == {"config.json", "model.safetensors.index.json", *SHARDS}


def test_the_commit_is_told_and_a_second_download_fetches_nothing(hub, download):
    repository = hub.add("org/tiny", TINY)
    first = download("org/tiny")
    assert first.lines[-1]["sha"] == repository.branches["main"] == first.directory.name
    assert (first.directory / "model.safetensors").read_bytes() == b"weights"
    hub.seen.clear()
    assert download("org/tiny").directory == first.directory
    assert [seen.path for seen in hub.seen] == ["/api/models/org/tiny/revision/main"]


def test_a_new_commit_is_fetched_and_what_it_left_alone_is_not(hub, download):
    repository = hub.add("org/tiny", TINY)
    old = download("org/tiny").directory
    repository.commit({**TINY, "config.json": b'{"new": 1}'})
    hub.seen.clear()
    new = download("org/tiny").directory
    assert (old / "config.json").read_bytes() != (new / "config.json").read_bytes()
    assert (new / "model.safetensors").read_bytes() == b"weights"
    assert hub.sent("model.safetensors") == []


@pytest.mark.parametrize("named", ["flag", "variable", "SageMaker's"])
def test_a_revision_is_a_branch_a_tag_or_a_commit(hub, download, named):
    repository = hub.add("org/tiny", TINY)
    old = repository.branches["main"]
    repository.commit({**TINY, "config.json": b'{"v": 2}'}, branch="v2")
    flags = ["--revision=v2"] if named == "flag" else []
    environ = {"variable": {"REVISION": "v2"}, "SageMaker's": {"HF_MODEL_REVISION": "v2"}}.get(named, {})
    assert download("org/tiny", *flags, **environ).directory.name == repository.branches["v2"]
    assert download("org/tiny", f"--revision={old}").directory.name == old


@pytest.mark.parametrize("variable", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_API_TOKEN"])
def test_a_private_model_is_fetched_with_a_token_that_no_other_host_sees(hub, download, variable):
    hub.add("org/private", TINY, private=True)
    assert download("org/private", **{variable: TOKEN}).files() == set(TINY)
    assert {seen.token for seen in hub.seen if seen.path.startswith("/cdn/")} == {None}
    assert {seen.token for seen in hub.seen if not seen.path.startswith("/cdn/")} == {TOKEN}


def test_a_token_may_stand_in_a_file(hub, download, tmp_path):
    hub.add("org/private", TINY, private=True)
    (tmp_path / "secret").write_text(f"{TOKEN}\n")
    assert download("org/private", HF_TOKEN=f"@{tmp_path / 'secret'}").code == 0


def test_refusals_say_what_to_do(hub, download):
    hub.add("org/private", TINY, private=True)
    hub.add("org/gated", TINY, gated=True)
    hub.add("org/tiny", TINY)
    for name in ("org/private", "org/unknown"):
        error = download(name).error
        assert f"no directory '{name}', and the hub knows no such model or keeps it private" in error
        assert "HF_TOKEN" in error
    assert "no directory 'org/unknown'" in download("org/unknown", HF_TOKEN=TOKEN).error
    for environ in ({}, {"HF_TOKEN": TOKEN}):
        error = download("org/gated", **environ).error
        assert "gated: ask for access" in error
        assert f"{hub.url}/org/gated" in error
        assert "HF_TOKEN" in error
    assert "refuses the token" in download("org/tiny", HF_TOKEN="hf_wrong").error
    assert "no revision 'v9'; see --revision" in download("org/tiny", "--revision=v9").error
    assert "neither a directory nor a model of the hub" in download("not/a/model").error


def test_a_repository_of_pickles_is_refused_with_the_way_out(hub, download):
    hub.add("org/old", {"config.json": b"{}", "pytorch_model.bin": b"pickle", "training_args.bin": b"pickle"})
    assert "`weir convert`" in download("org/old").error
    assert hub.sent("pytorch_model.bin") == []


def test_what_is_no_model_is_refused_before_anything_is_fetched(hub, download):
    hub.add("org/data", {"train.csv": b"1,2"})
    hub.add("org/empty", {"config.json": b"{}", "training_args.bin": b"pickle"})
    assert "holds no config.json" in download("org/data").error
    assert "holds no .safetensors weights" in download("org/empty").error
    assert not any("resolve" in seen.path for seen in hub.seen)


def test_a_broken_index_is_named(hub, download):
    second = {"model-00002-of-00002.safetensors": b"two"}
    hub.add("org/big", {"config.json": b"{}", "model.safetensors.index.json": INDEX.encode(), **second})
    assert "model-00001-of-00002.safetensors is named in" in download("org/big").error
    stray = json.dumps({"weight_map": {"a": "../../stray.safetensors"}}).encode()
    hub.add("org/bad", {"config.json": b"{}", "model.safetensors.index.json": stray, **second})
    assert "not a plain file name" in download("org/bad").error


def test_a_connection_that_is_cut_is_taken_up_where_it_broke(hub, download):
    weights = os.urandom(12_000_000)
    hub.add("org/tiny", {**TINY, "model.safetensors": weights})
    hub.cuts["model.safetensors"] = 11_000_000
    assert (download("org/tiny").directory / "model.safetensors").read_bytes() == weights
    ranges = [seen.range for seen in hub.sent("model.safetensors")]
    assert ranges[0] is None
    assert int(ranges[1].removeprefix("bytes=").removesuffix("-")) > 1_000_000


def test_offline_the_cache_answers_without_a_request(hub, download):
    hub.add("org/tiny", TINY)
    online = download("org/tiny")
    hub.seen.clear()
    offline = download("org/tiny", HF_HUB_OFFLINE="1")
    assert offline.directory == online.directory
    assert offline.lines[-1]["sha"] == online.directory.name
    assert download("org/tiny", f"--revision={online.directory.name}", HF_HUB_OFFLINE="1").code == 0
    assert hub.seen == []


def test_offline_what_is_not_in_the_cache_is_named(hub, download):
    hub.add("org/tiny", TINY)
    error = download("org/tiny", HF_HUB_OFFLINE="1").error
    assert "HF_HUB_OFFLINE is set" in error
    assert "lacks everything of org/tiny (revision main)" in error
    (download("org/tiny").directory / "model.safetensors").unlink()
    assert "lacks model.safetensors of org/tiny" in download("org/tiny", HF_HUB_OFFLINE="1").error
    assert hub.sent("model.safetensors"), "the hub was asked once"


def test_a_hub_that_cannot_be_reached_is_no_reason_not_to_serve_what_is_here(hub, download):
    hub.add("org/tiny", TINY)
    online = download("org/tiny")
    gone = download("org/tiny", HF_ENDPOINT="http://127.0.0.1:9")
    assert gone.directory == online.directory
    warnings = [line["message"] for line in gone.lines if line["level"] == "WARN"]
    assert len(warnings) == 1
    assert "cannot be reached" in warnings[0]
    assert "http://127.0.0.1:9 cannot be reached" in download("org/other", HF_ENDPOINT="http://127.0.0.1:9").error


def test_a_hub_that_is_busy_is_asked_again(hub, download):
    hub.add("org/tiny", TINY)
    hub.busy = 2
    done = download("org/tiny")
    assert done.files() == set(TINY)
    warnings = [line["message"] for line in done.lines if line["level"] == "WARN"]
    assert [warning[-19:] for warning in warnings] == ["Trying again in 1 s", "Trying again in 2 s"]


def test_downloads_are_kept_where_the_operator_says(hub, download, tmp_path):
    hub.add("org/tiny", TINY)
    named = tmp_path / "named"
    assert download("org/tiny", f"--huggingface-hub-cache={named}").directory.is_relative_to(named)
    assert download("org/tiny", HUGGINGFACE_HUB_CACHE=str(named)).directory.is_relative_to(named)
    assert download("org/tiny").directory.is_relative_to(tmp_path / "hf" / "hub")
    (tmp_path / "file").write_text("")
    assert "Cannot write to" in download("org/tiny", f"--huggingface-hub-cache={tmp_path / 'file'}").error


def test_parts_that_a_killed_download_left_are_removed_and_those_of_a_running_one_are_not(hub, download):
    repository = hub.add("org/tiny", TINY)
    blobs = download("org/tiny").directory.parents[1] / "blobs"
    (blobs / "0123.abcd.incomplete").write_bytes(b"old")
    os.utime(blobs / "0123.abcd.incomplete", (0, 0))
    (blobs / "4567.abcd.incomplete").write_bytes(b"being written")
    repository.commit({**TINY, "config.json": b'{"new": 1}'})
    assert download("org/tiny").code == 0
    assert {path.name for path in blobs.glob("*.incomplete")} == {"4567.abcd.incomplete"}


def test_the_clients_own_tales_stay_here(hub, download):
    """It would ask the hub about the tools around it, and warn of a variable that TGI's images set."""
    hub.add("org/tiny", TINY)
    done = download("org/tiny", HF_HUB_ENABLE_HF_TRANSFER="1")
    assert {line["level"] for line in done.lines} == {"INFO"}
    assert done.stderr == ""
    assert all("org/tiny" in seen.path for seen in hub.seen)


def test_tgis_options_are_taken_and_unknown_ones_are_bad_usage(hub, download):
    hub.add("org/tiny", TINY)
    flags = ("--logger-level=ERROR", "--auto-convert", "--no-merge-lora", "--trust-remote-code")
    quiet = download("org/tiny", *flags, "--extension=.safetensors")
    assert (quiet.code, quiet.lines) == (0, [])
    for flag in ("--extension=.bin", "--revison=x"):
        refused = download("org/tiny", flag)
        assert (refused.code, refused.lines) == (2, [])
        assert refused.stderr.count("\n") == 1


def test_a_directory_is_found_at_once(download, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    assert f"{model} holds no config.json" in download(str(model)).error
    (model / "config.json").write_text("{}")
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    assert "`weir convert`" in download(str(model)).error
    (model / "model.safetensors").write_bytes(b"")
    assert download(str(model)).directory == model


def test_an_adapter_brings_its_base_model_along(hub, download, tmp_path):
    said = {"peft_type": "LORA", "base_model_name_or_path": "org/tiny", "revision": "v2"}
    adapter = {"adapter_config.json": json.dumps(said).encode(), "adapter_model.safetensors": b"small"}
    repository = hub.add("org/tiny", TINY)
    repository.commit({**TINY, "config.json": b'{"v": 2}'}, branch="v2")
    hub.add("org/adapter", {**adapter, "tokenizer.json": b"{}", "adapter_model.bin": b"", "optimizer.bin": b""})
    done = download("org/adapter")
    assert done.directory.name == repository.branches["v2"], "the base is the model"
    assert done.lines[-1]["sha"] == hub.repositories["org/adapter"].branches["main"]
    own = Path(done.lines[-1]["adapter_directory"])
    assert {path.name for path in own.iterdir()} == {*adapter, "tokenizer.json"}
    assert download("org/adapter", HF_HUB_OFFLINE="1").lines[-1]["adapter_directory"] == str(own)

    local = tmp_path / "local"
    local.mkdir()
    (local / "adapter_config.json").write_text(json.dumps({**said, "base_model_name_or_path": str(own)}))
    assert f"{local} holds no .safetensors weights" in download(str(local)).error
    (local / "adapter_model.safetensors").write_bytes(b"small")
    assert "is an adapter itself" in download(str(local)).error


def test_an_adapter_that_cannot_be_merged_is_refused_before_its_base_is_fetched(hub, download):
    said = {"peft_type": "LORA", "base_model_name_or_path": "org/tiny", "use_dora": True}
    hub.add("org/tiny", TINY)
    hub.add("org/dora", {"adapter_config.json": json.dumps(said).encode(), "adapter_model.safetensors": b"small"})
    assert "use_dora" in download("org/dora").error
    assert not any("org/tiny" in seen.path for seen in hub.seen)


@pytest.mark.parametrize("revision", ["../../../../stray", "/tmp/stray", "a/../../b", "a//b", "a\nb", "a" * 300])
def test_a_revision_that_is_a_path_elsewhere_is_refused_also_where_an_adapter_names_it(hub, download, revision):
    said = {"peft_type": "LORA", "base_model_name_or_path": "org/tiny", "revision": revision}
    hub.add("org/tiny", TINY)
    hub.add("org/adapter", {"adapter_config.json": json.dumps(said).encode(), "adapter_model.safetensors": b"small"})
    assert "is no branch, tag or commit; see --revision" in download("org/adapter").error
    assert not any("org/tiny" in seen.path for seen in hub.seen)


def test_a_part_that_another_server_finished_meanwhile_is_none_to_remove(tmp_path, monkeypatch):
    left = tmp_path / "left.incomplete"
    left.touch()
    os.utime(left, (0, 0))
    monkeypatch.setattr(Path, "glob", lambda *_: iter([tmp_path / "finished.incomplete", left]))
    remove_abandoned(tmp_path)
    assert not left.exists()


ADAPTER = {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": b"small"}


def test_adapters_for_requests_come_along_with_their_own_revisions(hub, download, tmp_path):
    hub.add("org/tiny", TINY)
    others = ("README.md", "config.json", "tokenizer.json", "model.safetensors", "adapter_model.bin", "optimizer.bin")
    repository = hub.add("org/french", {**ADAPTER, **dict.fromkeys(others, b"unneeded")})
    repository.commit({**ADAPTER, "adapter_model.safetensors": b"newer"}, branch="v2")
    here = tmp_path / "here"
    here.mkdir()
    for name, content in ADAPTER.items():
        (here / name).write_bytes(content)
    named = f"--lora-adapters=org/french,new=org/french@v2,here={here}"
    told = download("org/tiny", named).lines[-1]
    assert set(told["adapters"]) == {"org/french", "new", "here"}
    first, new = Path(told["adapters"]["org/french"]), Path(told["adapters"]["new"])
    assert {path.name for path in first.iterdir()} == set(ADAPTER)
    assert (first / "adapter_model.safetensors").read_bytes() == b"small"
    assert (new / "adapter_model.safetensors").read_bytes() == b"newer"
    assert told["adapters"]["here"] == str(here)
    assert {path.name for path in Path(told["directory"]).iterdir()} == set(TINY)
    again = download("org/tiny", HF_HUB_OFFLINE="1", LORA_ADAPTERS=f"org/french,new=org/french@v2,here={here}")
    assert again.lines[-1]["adapters"] == told["adapters"]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (None, "the hub knows no such model or keeps it private"),
        (TINY, "org/french holds no adapter_config.json: it is no adapter"),
        ({"adapter_config.json": b"{}", "adapter_model.bin": b"pickle"}, "only safetensors are served"),
    ],
)
def test_an_adapter_that_cannot_be_had_is_named_and_nothing_of_it_is_fetched(hub, download, files, words):
    hub.add("org/tiny", TINY)
    if files is not None:
        hub.add("org/french", files)
    error = download("org/tiny", "--lora-adapters", "fr=org/french").error
    assert error.startswith("The adapter fr: ")
    assert words in error
    assert not [seen for seen in hub.seen if "/resolve/" in seen.path and "org/french" in seen.path]
