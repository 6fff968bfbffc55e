"""Models without a file of ours: served by transformers' own code on our cache, or refused with the reason."""

import json

import pytest
import torch
from models.cases import FALLBACK_CASES, randomized
from models.hand_fed import Ours
from models.rank_threads import on_ranks
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BertConfig,
    DiffLlamaConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    NllbMoeConfig,
    PegasusXConfig,
    Phi3Config,
    SwitchTransformersConfig,
)
from transformers.models.bart.modeling_bart import BartEncoderLayer

from serving.errors import ModelError
from serving.models import select
from serving.plan import NewRow, Row, StepPlan
from serving.protocol import SamplingParams
from serving.runner.frames import RunnerOptions
from serving.runner.load import load_runner
from serving.weights.checkpoint import SafetensorsCheckpoint

TINY = {
    "vocab_size": 131, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
TINY_ENCODER_DECODER = {
    "vocab_size": 131, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80, "max_position_embeddings": 96,
    "decoder_start_token_id": 2,
}  # fmt: skip
# A configuration and a model of a family that transformers does not know, as a checkpoint may bring them along.
OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
open(__file__ + ".ran", "w").close()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def runner(directory, **options):
    return load_runner(
        RunnerOptions(model_dir=str(directory), dtype="float32", device="cpu", max_rows=4, max_step_tokens=64,
                      kv_cache_bytes=1 << 20, **options)
    )  # fmt: skip


def refusal(directory, **options):
    with pytest.raises(ModelError) as caught:
        runner(directory, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def greedy(runner, prompt, count):
    known, started = list(prompt), [NewRow(sequence_id=1, token_ids=prompt, prompt_length=len(prompt),
                                           sampling=SamplingParams())]  # fmt: skip
    for _ in range(count):
        position = 0 if started else len(known) - 1
        step = Row(sequence_id=1, token_ids=known[position:], position=position, block_table=[1, 2], sample=True)
        runner.submit(StepPlan(rows=[step], started=started))
        started = []
        known.append(runner.collect().rows[0].choice.token_id)
    return known


@pytest.fixture
def modules(tmp_path_factory, monkeypatch):
    """Where transformers copies code before it runs it."""
    directory = tmp_path_factory.mktemp("modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(directory))
    return directory


@pytest.fixture
def own_code(tmp_path, modules):
    """A Llama under another name, whose code lies beside its weights."""
    randomized(LlamaConfig(**TINY)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    mine = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": mine}))
    (tmp_path / "own.py").write_text(OWN_CODE)
    return tmp_path


def test_the_runner_generates_what_transformers_generates(tmp_path):
    theirs = randomized(FALLBACK_CASES["smollm3"])
    theirs.save_pretrained(tmp_path)
    prompt = [5, 6, 7, 90]
    want = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert greedy(runner(tmp_path), prompt, 12) == want[0].tolist()


def test_random_weights_are_drawn_for_a_fallback_too(tmp_path):
    FALLBACK_CASES["olmoe"].save_pretrained(tmp_path)
    assert runner(tmp_path, load_format="dummy").facts.weight_bytes > 0


def test_weights_are_counted(tmp_path):
    theirs = randomized(FALLBACK_CASES["persimmon"])
    theirs.save_pretrained(tmp_path)
    least = sum(parameter.nbytes for parameter in theirs.parameters())
    assert least <= Ours(tmp_path).built.weight_bytes < 1.1 * least


def test_masks_are_not_made_in_a_serving_step(tmp_path, monkeypatch):
    def fail(*_):
        raise AssertionError("a mask is made")

    randomized(FALLBACK_CASES["smollm3"]).save_pretrained(tmp_path)
    served = runner(tmp_path)
    monkeypatch.setattr("transformers.masking_utils.AttentionMaskInterface.__getitem__", fail, raising=False)
    assert len(greedy(served, [5, 6], 2)) == 4


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (MambaConfig(vocab_size=131, hidden_size=64, num_hidden_layers=2, state_size=8), "take no attention function"),
        (Lfm2Config(**TINY, layer_types=["conv", "full_attention"]), "apart from those that it computes by itself"),
        (DiffLlamaConfig(**TINY), "a layer attends twice"),
        (BertConfig(**{**TINY, "num_key_value_heads": 8}), "neither causal nor a window"),
    ],
    ids=["no attention", "a state besides keys and values", "two attentions in a layer", "looks ahead"],
)  # fmt: skip
def test_what_cannot_run_on_a_paged_cache_is_refused(config, why, tmp_path):
    randomized(config).save_pretrained(tmp_path)
    assert why in refusal(tmp_path)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (PegasusXConfig(**TINY_ENCODER_DECODER), "take no attention function"),
        (NllbMoeConfig(**TINY_ENCODER_DECODER), "its attention looks ahead"),
        (
            SwitchTransformersConfig(vocab_size=131, d_model=64, d_kv=8, d_ff=80, num_layers=1, num_heads=8,
                                     num_sparse_encoder_layers=0, num_sparse_decoder_layers=0, num_decoder_layers=1,
                                     decoder_start_token_id=0),
            "its attention also asks for 'position_bias'",
        ),
    ],
    ids=["no attention", "does not say that it looks back", "biases by position"],
)  # fmt: skip
def test_an_encoder_decoder_that_cannot_run_on_our_caches_is_refused(config, why, tmp_path):
    randomized(config).save_pretrained(tmp_path)
    assert why in refusal(tmp_path)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"is_encoder_decoder": None}, "`is_encoder_decoder`"),
        ({"decoder_start_token_id": None}, "decoder_start_token_id"),
    ],
)
def test_an_encoder_decoder_that_does_not_say_how_answers_begin_is_refused(change, why, tmp_path):
    randomized(BartConfig(**TINY_ENCODER_DECODER)).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    said = {**config, "bos_token_id": None, **change}
    (tmp_path / "config.json").write_text(json.dumps({key: value for key, value in said.items() if value is not None}))
    assert why in refusal(tmp_path)


def test_an_encoder_that_looks_at_other_texts_of_a_batch_is_refused(tmp_path, monkeypatch):
    randomized(BartConfig(**TINY_ENCODER_DECODER)).save_pretrained(tmp_path)
    alone = BartEncoderLayer.forward

    def mixing(self, hidden_states, *args, **said):
        return alone(self, hidden_states - hidden_states.mean(1, keepdim=True), *args, **said)

    monkeypatch.setattr(BartEncoderLayer, "forward", mixing)
    assert "apart from those that it computes by itself" in refusal(tmp_path)


def test_a_type_that_nobody_knows_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nobody", "vocab_size": 10}))
    assert "'nobody'" in refusal(tmp_path)


def test_a_model_of_more_than_text_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": {"vocab_size": 10}}))
    assert "more than text" in refusal(tmp_path)


def test_rotations_that_change_with_the_longest_batch_mate_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(select, "ARCHITECTURES", {})
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    randomized(
        Phi3Config(**TINY, original_max_position_embeddings=128, rope_parameters=rope, pad_token_id=0)
    ).save_pretrained(tmp_path)
    assert "beside other rows" in refusal(tmp_path)


def test_ranks_are_refused(tmp_path):
    randomized(FALLBACK_CASES["smollm3"]).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="--num-shard 2"):
        on_ranks(2, lambda ranks: Ours(tmp_path, ranks=ranks))


def test_missing_tensors_are_named(tmp_path):
    randomized(FALLBACK_CASES["smollm3"]).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    assert "model.layers.1.self_attn.k_proj.weight" in refusal(tmp_path)


def test_a_tensor_that_cannot_be_read_is_said_in_the_checkpoints_own_words(tmp_path):
    randomized(FALLBACK_CASES["olmoe"]).save_pretrained(tmp_path)

    class Torn(SafetensorsCheckpoint):
        def read(self, name):
            if "experts.1.up_proj" in name:
                raise ModelError(f"model.safetensors cannot be read at {name!r}")
            return super().read(name)

    with pytest.raises(ModelError, match=r"^model\.safetensors cannot be read at .*experts\.1\.up_proj"):
        Ours(tmp_path, weights=Torn(tmp_path))


def test_a_config_that_does_not_fit_the_weights_is_refused(tmp_path):
    randomized(FALLBACK_CASES["smollm3"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 84}))
    assert "mlp.down_proj.weight is [64, 80], but config.json makes it [64, 84]" in refusal(tmp_path)


def test_code_that_comes_with_a_model_does_not_run_unless_trusted(own_code, modules):
    assert "--trust-remote-code" in refusal(own_code)
    assert "--trust-remote-code" in refusal(own_code, load_format="dummy")
    assert not list(own_code.rglob("*.ran")) + list(modules.rglob("*.ran"))


def test_random_weights_are_not_drawn_for_code_that_comes_with_a_model(own_code):
    assert "--load-format dummy" in refusal(own_code, trust_remote_code=True, load_format="dummy")


def test_trusted_code_runs(own_code, modules):
    assert len(greedy(runner(own_code, trust_remote_code=True), [5, 6], 3)) == 5
    assert list(modules.rglob("*.ran"))
