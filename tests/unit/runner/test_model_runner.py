"""The runner in process, against transformers and against itself in other batches."""

import json
import re
import shutil

import pytest
import torch
from models.cases import CASES, randomized
from models.lora_files import random_adapter
from safetensors.torch import load_file, save_file

from serving.errors import ConfigurationError, ModelError
from serving.plan import NewAdapter, NewRow, Row, StepPlan
from serving.protocol import SamplingParams
from serving.runner.frames import RunnerOptions
from serving.runner.load import load_runner

PROMPT = [(5 * i + 3) % 131 for i in range(40)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    randomized(CASES["llama"]).save_pretrained(directory)
    return directory


def options(directory, **changes):
    given = {"device": "cpu", "dtype": "float32", "max_rows": 4, "max_step_tokens": 64, "kv_cache_bytes": 1 << 20}
    return RunnerOptions(model_dir=str(directory), **{**given, **changes})


def generate(runner, count, sampling, chunk=64, sequence_id=1):
    """One sequence alone, its prompt in chunks, then token by token: the choices and the prompt's log probabilities."""
    started = [NewRow(sequence_id=sequence_id, token_ids=PROMPT, prompt_length=len(PROMPT), sampling=sampling)]
    known, computed, prompt_logprobs, choices = list(PROMPT), 0, [], []
    while len(choices) < count:
        ids = known[computed : computed + chunk]
        end = computed + len(ids)
        row = Row(
            sequence_id=sequence_id, token_ids=ids, position=computed, block_table=[3, 1, 4, 2, 5],
            sample=end == len(known),
        )  # fmt: skip
        runner.submit(StepPlan(rows=[row], started=started))
        (result,) = runner.collect().rows
        started, computed = [], end
        prompt_logprobs += result.prompt_logprobs
        if result.choice:
            choices.append(result.choice)
            known.append(result.choice.token_id)
    runner.submit(StepPlan(rows=[], finished=[sequence_id]))
    runner.collect()
    return choices, prompt_logprobs


def test_greedy_tokens_and_all_log_probabilities_equal_transformers(checkpoint):
    runner = load_runner(options(checkpoint))
    choices, prompt_logprobs = generate(runner, 12, SamplingParams(prompt_logprobs=True, top_n_tokens=3))
    theirs = randomized(CASES["llama"])
    with torch.inference_mode():
        out = theirs.generate(
            torch.tensor([PROMPT]), max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None
        )[0]
        want = theirs(out[None]).logits[0].log_softmax(-1)
    assert [choice.token_id for choice in choices] == out[len(PROMPT) :].tolist()
    expected = [want[i, out[i + 1]].item() for i in range(len(out) - 1)]
    got = prompt_logprobs + [choice.logprob for choice in choices]
    assert got == pytest.approx(expected, abs=1e-3)
    for i, choice in enumerate(choices):
        best = want[len(PROMPT) - 1 + i].topk(3)
        assert [token_id for token_id, _ in choice.top[:3]] == best.indices.tolist()


@pytest.mark.parametrize("chunk", [7, 16, 39])
def test_chunks_change_neither_tokens_nor_prompt_log_probabilities(checkpoint, chunk):
    runner = load_runner(options(checkpoint))
    sampling = SamplingParams(do_sample=True, temperature=1.3, seed=11, prompt_logprobs=True, repetition_penalty=1.2)
    whole, whole_prompt = generate(runner, 20, sampling)
    parts, parts_prompt = generate(runner, 20, sampling, chunk=chunk, sequence_id=2)
    assert [choice.token_id for choice in parts] == [choice.token_id for choice in whole]
    assert parts_prompt == pytest.approx(whole_prompt, abs=1e-4)
    assert len(parts_prompt) == len(PROMPT) - 1


def test_facts_say_what_was_measured(checkpoint):
    facts = load_runner(options(checkpoint)).facts
    weights = sum(p.numel() for p in randomized(CASES["llama"]).parameters()) * 4
    assert facts.weight_bytes == weights
    assert facts.kv_bytes <= 1 << 20
    assert facts.kv_bytes == facts.block_count * facts.block_size * 3 * 2 * 2 * 8 * 4
    assert (facts.dtype, facts.device, facts.vocab_size, facts.max_position) == ("float32", "cpu", 131, 256)


def test_random_weights_need_no_weights_on_disk(checkpoint, tmp_path):
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    first, again = (
        generate(load_runner(options(tmp_path, load_format="dummy")), 5, SamplingParams())[0] for _ in range(2)
    )
    assert len(first) == 5
    assert first == again  # a runner that starts again has the same weights


@pytest.mark.parametrize(("asked", "computed"), [("float16", "float32"), ("bfloat16", "bfloat16"), (None, "float32")])
def test_types_that_a_cpu_does_not_compute_are_replaced(checkpoint, asked, computed):
    assert load_runner(options(checkpoint, dtype=asked)).facts.dtype == computed


def test_more_tokens_than_positions_were_learned_do_not_break_the_first_step(tmp_path):
    randomized(CASES["gpt2"]).save_pretrained(tmp_path)
    runner = load_runner(options(tmp_path, max_total_tokens=4096, max_step_tokens=600))
    assert runner.facts.max_position == 256  # by which whoever asked is refused


def test_too_little_memory_says_what_to_decrease(checkpoint):
    with pytest.raises(ConfigurationError, match="max_total_tokens=256"):
        load_runner(options(checkpoint, kv_cache_bytes=20_000, max_total_tokens=256))
    with pytest.raises(ConfigurationError, match="kv-cache-memory"):
        load_runner(options(checkpoint, kv_cache_bytes=1 << 50))


@pytest.mark.parametrize(
    ("key", "said", "lie", "message"),
    [
        ("head_dim", 8, 10, r"q_proj\.weight is \[64, 64\] instead of \[80, 64\], .* and 7 more"),
        ("vocab_size", 131, 200, "has 131 rows, but config.json says vocab_size 200"),
        ("num_hidden_layers", 3, 4, r"lack 9 tensors of the model: model\.layers\.3\..* and 4 more;"),
    ],
)
def test_weights_that_do_not_fit_their_config_are_a_model_error(checkpoint, tmp_path, key, said, lie, message):
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config[key] == said
    (tmp_path / "config.json").write_text(json.dumps({**config, key: lie}))
    with pytest.raises(ModelError, match=message):
        load_runner(options(tmp_path))


def test_all_tensors_that_are_missing_are_named_at_once(checkpoint, tmp_path):
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(checkpoint / "model.safetensors")
    gone = ["model.layers.0.self_attn.k_proj.weight", "model.layers.2.mlp.up_proj.weight", "model.norm.weight"]
    save_file({k: v for k, v in tensors.items() if k not in gone}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="lack 3 tensors of the model: " + ", ".join(map(re.escape, gone)) + ";"):
        load_runner(options(tmp_path))
    save_file({k: v for k, v in tensors.items() if k != "model.norm.weight"}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"lack tensor 'model\.norm\.weight'; do config\.json"):
        load_runner(options(tmp_path))


def test_unexpected_tensors_are_named_in_one_warning_alike_ones_once(checkpoint, tmp_path, caplog):
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    stray = {f"model.layers.{i}.odd": torch.ones(2) for i in range(3)} | {
        "x": torch.ones(2),
        "lm_head.bias": torch.ones(3),
    }
    computed = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    save_file(load_file(checkpoint / "model.safetensors") | stray | computed, tmp_path / "model.safetensors")
    load_runner(options(tmp_path))
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert record.getMessage() == "5 tensors of the checkpoint are not used: lm_head.bias, model.layers.*.odd, x"


def test_an_architecture_that_nobody_knows_is_refused_before_weights_are_looked_for(checkpoint, tmp_path):
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text().replace('"llama"', '"nobody"'))
    with pytest.raises(ModelError, match="unsupported model type 'nobody'"):
        load_runner(options(tmp_path))


def changed(checkpoint, tmp_path, **said):
    """A copy of the checkpoint whose config.json says something else."""
    directory = tmp_path / "changed"
    shutil.copytree(checkpoint, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **said}))
    return directory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head_dim", [4, 7, 16])
def test_heads_of_another_size_than_the_weights_are_a_model_error_not_a_crash(checkpoint, tmp_path, dtype, head_dim):
    with pytest.raises(ModelError):
        load_runner(options(changed(checkpoint, tmp_path, head_dim=head_dim), dtype=dtype))


def test_a_decoder_that_calls_itself_an_encoder_decoder_is_refused(checkpoint, tmp_path):
    directory = changed(checkpoint, tmp_path, is_encoder_decoder=True, decoder_start_token_id=0)
    with pytest.raises(ModelError, match="'llama' is none"):
        load_runner(options(directory))


@pytest.mark.parametrize("said", [{"max_position_embeddings": 2**31 - 1}])
def test_positions_beyond_reason_do_not_become_memory(checkpoint, tmp_path, said):
    assert (
        load_runner(options(changed(checkpoint, tmp_path, **said), max_total_tokens=256)).facts.max_position <= 1 << 20
    )


def test_memory_for_adapters_is_taken_from_the_cache(checkpoint, monkeypatch):
    taken = []
    monkeypatch.setattr("serving.runner.assembly.kv_budget", lambda *given: taken.append(given[-1]) or 1 << 20)
    for adapters in (0, 10_000):  # nothing of them is there yet
        load_runner(options(checkpoint, max_adapters=adapters))
    numbers = (
        3 * 64 * (3 * (64 + 96) + (64 + 64) + 2 * (64 + 160) + (80 + 64))
    )  # 3 layers, rank 64: q to v, o, gate and up, down
    assert taken[1] - taken[0] == pytest.approx(10_000 * numbers * 4, rel=0.01)


def test_an_encoder_decoder_is_not_adapted_while_it_runs(checkpoint, tmp_path):
    directory = changed(checkpoint, tmp_path, is_encoder_decoder=True, decoder_start_token_id=0)
    with pytest.raises(ConfigurationError, match="--max-lora-adapters: an encoder-decoder"):
        load_runner(options(directory, max_adapters=1))


def first_of_a_short_prompt(runner, sequence_id):
    new = NewRow(sequence_id=sequence_id, token_ids=PROMPT[:5], prompt_length=5, sampling=SamplingParams())
    row = Row(sequence_id=sequence_id, token_ids=PROMPT[:5], position=0, block_table=[3], sample=True)
    (result,) = runner.execute(StepPlan(rows=[row], started=[new])).rows
    runner.execute(StepPlan(rows=[], finished=[sequence_id]))
    return result.choice


def test_a_row_without_numbers_fails_alone_and_leaves_nothing_in_its_blocks(checkpoint, tmp_path):
    adapter = random_adapter(checkpoint, tmp_path / "adapter", 1)
    huge = {name: tensor * 1e18 for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(huge, adapter / "adapter_model.safetensors")  # finite, but not what comes of it
    runner = load_runner(options(checkpoint, max_adapters=1))
    assert runner.execute(StepPlan(rows=[], adapters=[NewAdapter(1, str(adapter))])).refused == {}
    want, short = generate(runner, 6, SamplingParams())[0], first_of_a_short_prompt(runner, 9)
    news = [
        NewRow(sequence_id=i, token_ids=PROMPT, prompt_length=40, sampling=SamplingParams(), adapter=int(i == 8))
        for i in (7, 8)
    ]
    rows = [
        Row(sequence_id=i, token_ids=PROMPT[:end], position=0, block_table=table, sample=i == 7)
        for i, end, table in ((7, 40, [6, 7, 8]), (8, 30, [3, 1]))
    ]
    fine, broken = runner.execute(StepPlan(rows=rows, started=news)).rows
    assert fine.choice.token_id == want[0].token_id
    assert "not a finite number" in broken.error
    runner.execute(StepPlan(rows=[], finished=[7, 8]))
    # In a block of the broken one, most of which it does not write itself.
    assert first_of_a_short_prompt(runner, 10) == short
