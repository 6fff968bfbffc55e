"""`weir convert`, as functions on real files and as the process that an operator starts."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from models.cases import CASES, randomized
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import T5Config, T5ForConditionalGeneration

from serving.errors import ModelError
from serving.weights import convert as converter
from serving.weights.checkpoint import SafetensorsCheckpoint
from serving.weights.convert import convert

WIDE = torch.randn(8, 6)
TENSORS = {
    "wide": WIDE,
    "turned": torch.randn(3, 5).t(),
    "upper": WIDE[:2],
    "lower": WIDE[2:],
    "bfloat16": torch.randn(7).bfloat16(),
    "half": torch.randn(7).half(),
    "double": torch.randn(7).double(),
    "byte": torch.arange(5, dtype=torch.uint8),
    "long": torch.arange(5),
    "yes": torch.tensor([True, False, True]),
    "float8": torch.randn(4).to(torch.float8_e4m3fn),
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(3.5),
    "parameter": torch.nn.Parameter(torch.ones(2)),
}


class Evil:
    """What a pickle can be: a call of whatever its author likes."""

    def __init__(self, marker):
        self.command = f"touch {marker}"

    def __reduce__(self):
        return os.system, (self.command,)


def weir_convert(*arguments, **more):
    command = [sys.executable, "-m", "serving", "convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **more)


def bits(tensor):
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def same(ours, theirs):
    return ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(bits(ours), bits(theirs))


def files(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("old_format", [False, True])
def test_every_bit_type_and_shape_stays(tmp_path, old_format):
    tensors = {name: tensor for name, tensor in TENSORS.items() if not (old_format and name == "float8")}
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not old_format)
    assert convert(tmp_path, tmp_path) == [tmp_path / "model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert [name for name, tensor in tensors.items() if not same(found[name], tensor)] == []
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert all(file.get_tensor(name).data_ptr() % tensors[name].itemsize == 0 for name in tensors)


def tied_models():
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 40}
    yield "t5", lambda: T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    for name in ("llama-biased-tied", "gpt2", "gemma", "cohere", "starcoder2", "llama"):
        yield name, lambda name=name: randomized(CASES[name])


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in tied_models()])
def test_of_tied_tensors_the_name_stays_that_transformers_keeps(tmp_path, make):
    model = make()
    model.save_pretrained(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    torch.save(model.state_dict(), tmp_path / "ours" / "pytorch_model.bin")
    convert(tmp_path / "ours", tmp_path / "ours")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert ours.keys() == load_file(tmp_path / "theirs" / "model.safetensors").keys()
    served = SafetensorsCheckpoint(tmp_path / "ours")
    for name, tensor in model.state_dict().items():
        assert same(served.read(name), tensor), "a name that went is still found"
    assert len({tensor.data_ptr() for tensor in model.state_dict().values()}) == len(ours)


def shards(directory, index=True):
    torch.save({"a": torch.ones(3), "c": torch.zeros(2)}, directory / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.full((4,), 2.0)}, directory / "pytorch_model-00002-of-00002.bin")
    if index:
        weight_map = {
            "a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin",
            "c": "pytorch_model-00001-of-00002.bin",
        }  # fmt: skip
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("index", [True, False])
def test_shards_stay_shards(tmp_path, index):
    shards(tmp_path, index)
    convert(tmp_path, tmp_path)
    written = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert written == {"metadata": {"total_size": 36}, "weight_map": {"a": first, "b": second, "c": first}}
    assert load_file(tmp_path / second)["b"].tolist() == [2.0] * 4
    assert SafetensorsCheckpoint(tmp_path).read("a").tolist() == [1.0] * 3


def test_shards_that_are_not_all_there_are_named(tmp_path):
    shards(tmp_path, index=False)
    (tmp_path / "pytorch_model-00001-of-00002.bin").unlink()
    with pytest.raises(ModelError, match=r"lacks pytorch_model-00001-of-00002\.bin"):
        convert(tmp_path, tmp_path)


def test_an_index_that_promises_what_its_file_lacks_is_refused(tmp_path):
    shards(tmp_path)
    torch.save({"a": torch.ones(3)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    before = files(tmp_path)
    with pytest.raises(ModelError, match=r"pytorch_model-00001-of-00002\.bin does not hold c"):
        convert(tmp_path, tmp_path)
    assert files(tmp_path) == before


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    shards(tmp_path, index=False)
    torch.save({"a": torch.ones(3)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(ModelError, match="holds a, which another file holds as well"):
        convert(tmp_path, tmp_path)


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_a_lone_file_of_any_name_is_found_beside_what_training_left(tmp_path, wrapper):
    torch.save({wrapper: {"a": torch.ones(2)}, "epoch": 3}, tmp_path / "best.pt")
    torch.save({"lr": 0.1}, tmp_path / "optimizer.pt")
    torch.save({"x": 1}, tmp_path / "training_args.bin")
    convert(tmp_path, tmp_path)
    assert load_file(tmp_path / "model.safetensors")["a"].tolist() == [1.0, 1.0]


def test_of_several_files_one_has_to_be_named(tmp_path):
    for name in ("one.bin", "two.bin"):
        torch.save({"a": torch.ones(2)}, tmp_path / name)
    with pytest.raises(ModelError, match=r"holds one\.bin, two\.bin; name the file"):
        convert(tmp_path, tmp_path)
    assert convert(tmp_path / "two.bin", tmp_path) == [tmp_path / "model.safetensors"]


def test_an_adapter_keeps_its_name(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "adapter_model.bin")
    assert convert(tmp_path, tmp_path) == [tmp_path / "adapter_model.safetensors"]


def test_another_directory_gets_configuration_and_tokenizer_but_no_pickle(tmp_path):
    source, target = tmp_path / "source", tmp_path / "deep" / "target"
    source.mkdir()
    shards(source)
    for name in ("config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "LICENSE", "modeling.py"):
        (source / name).write_text(name)
    for name in ("flax_model.msgpack", "rust_model.ot", "old.pkl", ".hidden"):
        (source / name).write_text(name)
    convert(source, target)
    assert files(target) == sorted([
        "config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "LICENSE", "modeling.py",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
    ])  # fmt: skip
    assert (target / "config.json").read_text() == "config.json"


def test_nothing_is_overwritten_unless_forced_and_nothing_mixed_up(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(ModelError, match=r"holds model\.safetensors already; --force"):
        convert(tmp_path, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"
    convert(tmp_path, tmp_path, force=True)
    assert load_file(tmp_path / "model.safetensors")["a"].tolist() == [1.0, 1.0]
    (tmp_path / "model.safetensors").rename(tmp_path / "model-1.safetensors")
    with pytest.raises(ModelError, match=r"model-1\.safetensors already, which would be mixed up"):
        convert(tmp_path, tmp_path, force=True)


def test_a_failure_on_the_way_leaves_what_was_there(tmp_path, monkeypatch):
    shards(tmp_path)
    before = files(tmp_path)
    seen = []

    def verify_once(path, tensors):
        seen.append(files(tmp_path))
        if len(seen) == 2:
            raise ModelError("the disk is not well")

    monkeypatch.setattr(converter, "verify", verify_once)
    with pytest.raises(ModelError, match="not well"):
        convert(tmp_path, tmp_path)
    assert not any(name.endswith(".safetensors") for name in seen[1]), "a whole file waits for the others"
    assert files(tmp_path) == before


def test_what_cannot_be_read_back_is_not_kept(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(200)}, tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(converter.os, "fsync", lambda descriptor: os.ftruncate(descriptor, 100))
    with pytest.raises(ModelError, match="cannot be read back"):
        convert(tmp_path, tmp_path)
    assert files(tmp_path) == ["pytorch_model.bin"]


def test_too_little_disk_is_said_before_it_is_filled(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(200)}, tmp_path / "pytorch_model.bin")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(converter.shutil, "disk_usage", lambda path: usage._replace(free=799))
    with pytest.raises(ModelError, match="GB free"):
        convert(tmp_path, tmp_path)


def test_a_target_that_cannot_be_written_is_named(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="file/below: Not a directory; nothing was converted"):
        convert(tmp_path, tmp_path / "file" / "below")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("old_format", [False, True])
def test_a_truncated_file_is_named(tmp_path, share, old_format):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.randn(500), "b": torch.randn(20)}, path, _use_new_zipfile_serialization=not old_format)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is corrupt, truncated"):
        convert(tmp_path, tmp_path)
    assert files(tmp_path) == ["pytorch_model.bin"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.ones(2)], "is no state dictionary"),
        ({"a": 3}, "is no state dictionary"),
        ({7: torch.ones(2)}, "a tensor's name is 7"),
        ({"a": torch.eye(3).to_sparse()}, "'a' .* safetensors does not keep"),
        ({"a": torch.empty(2, device="meta")}, "'a' .* safetensors does not keep"),
        ({"a": torch.ones(1).expand(1 << 40)}, "'a' claims 4398046511104 bytes"),
        (torch.nn.Linear(2, 2), "would call torch.nn.modules.linear.Linear"),
    ],
)
def test_what_is_no_state_dictionary_is_refused_with_its_name(tmp_path, content, words):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=f"pytorch_model.bin.*{words}"):
        convert(tmp_path, tmp_path)


def test_a_git_lfs_pointer_is_called_so(tmp_path):
    (tmp_path / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ModelError, match="Git LFS pointer"):
        convert(tmp_path, tmp_path)


@pytest.mark.parametrize("old_format", [False, True])
def test_a_malicious_pickle_is_refused_in_one_line_and_not_run(tmp_path, old_format):
    marker = tmp_path / "marker"
    torch.save(
        {"a": torch.ones(2), "b": Evil(marker)}, tmp_path / "pytorch_model.bin",
        _use_new_zipfile_serialization=not old_format,
    )  # fmt: skip
    refused = weir_convert(tmp_path)
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert "pytorch_model.bin holds more than tensors: it would call posix.system" in refused.stderr
    assert refused.stdout == ""
    assert files(tmp_path) == ["pytorch_model.bin"]
    # The same file does harm where it is trusted: the test above is about something.
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert marker.exists()


def test_the_command_says_what_it_wrote_and_what_it_does(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    done = weir_convert(tmp_path, tmp_path / "new")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"Wrote model.safetensors to {tmp_path / 'new'}\n"
    shown = weir_convert("--help")
    assert "SOURCE" in shown.stdout
    wrong = weir_convert(tmp_path / "nowhere")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "does not exist" in wrong.stderr


def test_a_conversion_that_is_stopped_leaves_nothing(tmp_path):
    """The converter is stopped while it writes into a pipe, which stands for a slow disk."""
    torch.save({"a": torch.ones(1 << 18)}, tmp_path / "pytorch_model.bin")
    os.mkfifo(tmp_path / "model.safetensors.partial")
    with subprocess.Popen([sys.executable, "-m", "serving", "convert", str(tmp_path)]) as process:
        with (tmp_path / "model.safetensors.partial").open("rb") as reader:  # returns when the writer is there
            until(lambda: int.from_bytes(fcntl.ioctl(reader, termios.FIONREAD, bytes(4)), "little") >= 1 << 15)
            process.send_signal(signal.SIGTERM)  # what a container's stop sends
            status = Path(f"/proc/{process.pid}/status")
            until(lambda: "ShdPnd:\t0000000000000000" in status.read_text())
            reader.read()
        assert process.wait(60) == 143
    assert files(tmp_path) == ["pytorch_model.bin"]


def until(come):
    deadline = time.monotonic() + 60
    while not come():
        assert time.monotonic() < deadline
        time.sleep(0.01)
