import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from serving.errors import ModelError
from serving.weights.checkpoint import SafetensorsCheckpoint, layerless

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
        weights = SafetensorsCheckpoint(tmp_path / name)
        weights.on_read = seen.append
        assert torch.equal(weights.read("a"), A)
        assert torch.equal(weights.read("a"), A)
        assert weights.unread() == ["b"]
        assert seen == [A.nbytes], "what is read twice counts once"
        assert weights.total_bytes == A.nbytes + B.nbytes


def anonymous_bytes():
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))


def test_a_missing_tensor_is_named(tmp_path):
    save_file({"a": A}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="'b'"):
        SafetensorsCheckpoint(tmp_path).read("b")


def test_a_tensor_is_a_view_of_its_file(tmp_path):
    save_file({"a": torch.zeros(1 << 22)}, tmp_path / "model.safetensors")
    before = anonymous_bytes()
    tensor = SafetensorsCheckpoint(tmp_path).read("a")
    assert tensor.sum() == 0
    assert anonymous_bytes() - before < tensor.nbytes / 2


@pytest.mark.parametrize("kept", [0, 4, 8, 40, 100, 2000, -1])
def test_a_truncated_file_is_named(tmp_path, kept):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1000), "b": torch.ones(3)}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"^model\.safetensors is corrupt or truncated: .+$"):
        SafetensorsCheckpoint(tmp_path)


def header(**tensors):
    return json.dumps({name: dict(zip(HEADER_KEYS, tensor, strict=True)) for name, tensor in tensors.items()}).encode()


HEADER_KEYS = ("dtype", "shape", "data_offsets")


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(header(a=("F32", [2], [0, 8]), b=("F32", [2], [4, 12])), id="overlapping"),
        pytest.param(header(a=("F32", [2], [0, 8]), b=("F32", [1], [12, 16])), id="with a hole"),
        pytest.param(header(a=("F32", [2], [0, 8])), id="of less than there is"),
        pytest.param(header(a=("F32", [200], [0, 800])), id="of more than there is"),
        pytest.param(header(a=("F32", [3], [0, 16])), id="of another size than its shape"),
        pytest.param(header(a=("F32", [1 << 62, 1 << 62], [0, 16])), id="of a shape beyond all bounds"),
        pytest.param(header(a=("F32", [-1], [0, 16])), id="of a negative shape"),
        pytest.param(header(a=("F32", [4], [16, 0])), id="turned round"),
        pytest.param(header(a=("X9", [4], [0, 16])), id="of an unknown type"),
        pytest.param(b'{"a": 3}', id="no tensor"),
        pytest.param(b"[]", id="no object"),
        pytest.param(b"[" * 100_000, id="nested"),
        pytest.param(b"\xff\xfe", id="no text"),
    ],
)
def test_a_header_that_contradicts_itself_or_the_file_is_refused(tmp_path, said):
    (tmp_path / "model.safetensors").write_bytes(len(said).to_bytes(8, "little") + said + bytes(16))
    with pytest.raises(ModelError, match=r"^model\.safetensors is corrupt or truncated: .+$"):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize("length", [(1 << 62), (1 << 64) - 1, 10**8, 3])
def test_a_header_of_a_lying_length_is_refused_before_anything_is_allocated(tmp_path, length):
    (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}" + bytes(16))
    with pytest.raises(ModelError, match=r"model\.safetensors is corrupt"):
        SafetensorsCheckpoint(tmp_path)


def test_a_git_lfs_pointer_is_called_so(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ModelError, match=r"model\.safetensors is only a Git LFS pointer"):
        SafetensorsCheckpoint(tmp_path)


def test_a_file_that_is_none_is_named(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ModelError, match=r"^model\.safetensors cannot be read: Is a directory$"):
        SafetensorsCheckpoint(tmp_path)


def test_a_directory_of_pickles_alone_is_told_how_to_convert_them(tmp_path):
    directory = tmp_path / "a model"
    directory.mkdir()
    (directory / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ModelError, match=r"but pytorch_model\.bin.*`weir convert '.*/a model'`"):
        SafetensorsCheckpoint(directory)
    with pytest.raises(ModelError, match=r"no \.safetensors file; only safetensors"):
        SafetensorsCheckpoint(tmp_path)


def test_a_tensor_in_two_files_is_refused_with_both_names(tmp_path):
    sharded(tmp_path, {})
    (tmp_path / "model.safetensors.index.json").unlink()
    save_file({"a": A}, tmp_path / "model-3.safetensors")
    with pytest.raises(ModelError, match=r"model-1\.safetensors and model-3\.safetensors both hold 'a'"):
        SafetensorsCheckpoint(tmp_path)


def test_where_an_index_says_which_file_a_tensor_in_two_files_is_read_from_that_one(tmp_path):
    sharded(tmp_path, {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    save_file({"a": A + 1, "b": B}, tmp_path / "model-2.safetensors")
    assert torch.equal(SafetensorsCheckpoint(tmp_path).read("a"), A)


def test_files_beside_the_weights_are_not_taken_for_them(tmp_path):
    save_file({"a": A}, tmp_path / "weights.safetensors")
    for name in ("adapter_model", "consolidated", "training_state"):
        save_file({"a": A + 1}, tmp_path / f"{name}.safetensors")
    assert torch.equal(SafetensorsCheckpoint(tmp_path).read("a"), A)


def test_of_numbered_files_without_an_index_the_missing_ones_are_named(tmp_path):
    for i in (1, 3):
        save_file({f"a{i}": A}, tmp_path / f"model-0000{i}-of-00004.safetensors")
    lacking = r"lacks model-00002-of-00004\.safetensors, model-00004-of-00004\.safetensors; is the download complete"
    with pytest.raises(ModelError, match=lacking):
        SafetensorsCheckpoint(tmp_path)


def test_a_name_that_a_file_says_means_another_tensor_is_served(tmp_path):
    save_file({"a": A}, tmp_path / "model.safetensors", metadata={"head": "a", "format": "pt", "stray": "gone"})
    weights = SafetensorsCheckpoint(tmp_path)
    assert weights.has("head")
    assert not weights.has("format")
    assert not weights.has("stray")
    assert weights.read("head").data_ptr() == weights.read("a").data_ptr()
    assert weights.unread() == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.12.mlp.experts.3.up.weight", "model.layers.*.mlp.experts.*.up.weight"),
        ("h.0.ln_1.weight", "h.*.ln_1.weight"),
        ("7", "*"),
    ],
)
def test_names_are_alike_where_only_numbers_differ(name, kind):
    assert layerless(name) == kind


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../../etc/passwd"}}, "plain file name"),
        ({"weight_map": {"a": "model-9.safetensors"}}, r"model-9\.safetensors is named"),
        (
            {"weight_map": {"a": "model-1.safetensors", "c": "model-2.safetensors"}},
            r"model-2\.safetensors does not hold c",
        ),
        ({"weight_map": {"a": 3}}, "not an index"),
        ({"weight_map": ["a"]}, "not an index"),
        ({"weight_map": {}}, "not an index"),
        ({"weights": {}}, "not an index"),
        ([], "not an index"),
    ],
)
def test_a_broken_index_is_refused(tmp_path, index, message):
    sharded(tmp_path, index)
    with pytest.raises(ModelError, match=message):
        SafetensorsCheckpoint(tmp_path)
