import json

import pytest
import torch
from safetensors.torch import save_file

from serving.errors import ModelError
from serving.weights.checkpoint import SafetensorsCheckpoint

A, B = torch.arange(6.0).view(2, 3), torch.ones(4)


def sharded(directory, index):
    save_file({"a": A}, directory / "model-1.safetensors")
    save_file({"b": B}, directory / "model-2.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def test_single_and_sharded_files_give_the_same_tensors(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    save_file({"a": A, "b": B}, tmp_path / "one" / "model.safetensors")
    sharded(tmp_path / "two", {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    for name in ("one", "two"):
        seen = []
        weights = SafetensorsCheckpoint(tmp_path / name, on_read=seen.append)
        assert torch.equal(weights.read("a"), A)
        assert weights.unread() == ["b"]
        assert seen == [A.nbytes]


def test_a_missing_tensor_is_named(tmp_path):
    save_file({"a": A}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="'b'"):
        SafetensorsCheckpoint(tmp_path).read("b")


@pytest.mark.parametrize("kept", [0, 4, 40, -1])
def test_a_truncated_file_is_named(tmp_path, kept):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"model\.safetensors is corrupt or truncated"):
        SafetensorsCheckpoint(tmp_path)


def test_a_file_with_a_lying_header_is_refused_before_anything_is_allocated(tmp_path):
    (tmp_path / "model.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(ModelError, match="corrupt"):
        SafetensorsCheckpoint(tmp_path)


def test_no_weights_at_all_says_what_is_served(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ModelError, match="only safetensors"):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../../etc/passwd"}}, "plain file name"),
        ({"weight_map": {"a": "model-9.safetensors"}}, r"model-9\.safetensors is named"),
        ({"weights": {}}, "not a safetensors index"),
        ([], "not a safetensors index"),
    ],
)
def test_a_broken_index_is_refused(tmp_path, index, message):
    sharded(tmp_path, index)
    with pytest.raises(ModelError, match=message):
        SafetensorsCheckpoint(tmp_path)
