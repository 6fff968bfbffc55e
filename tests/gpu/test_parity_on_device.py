"""Every architecture on a real device against transformers on the same device; skipped where there is none."""

import pytest
import torch
from models.cases import CASES, EVERY_CASE, EVERY_ENCODER_DECODER, randomized
from models.hand_fed import BLOCK, Ours, row, worst_difference

from serving.plan import NewRow, Row, StepPlan
from serving.protocol import SamplingParams
from serving.runner.frames import RunnerOptions
from serving.runner.load import load_runner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU found: torch sees no CUDA or ROCm device"),
]
DEVICE = torch.device("cuda")


# Kernels on a device sum in another order, and may multiply in TF32; a wrong mask or position is off by far more.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("case", EVERY_CASE)
def test_chunks_and_decode_equal_transformers(case, dtype, tolerance, tmp_path):
    theirs = randomized(EVERY_CASE[case])
    theirs.save_pretrained(tmp_path)
    ours, theirs = Ours(tmp_path, dtype, DEVICE), theirs.to(DEVICE, dtype)
    sequences = [[(7 * i + 5 * j) % 131 for j in range(24)] for i in range(6)]
    tables = [list(range(1 + 6 * i, 7 + 6 * i)) for i in range(6)]
    with torch.inference_mode():
        want = theirs(torch.tensor(sequences, device=DEVICE)).logits.float().cpu()
    got = [[] for _ in sequences]
    for start, end in ((0, 3 * BLOCK + 1), (3 * BLOCK + 1, 22), (22, 23), (23, 24)):
        rows = [row(i, ids, start, end, tables[i]) for i, ids in enumerate(sequences)]
        for parts, logits in zip(got, ours.logits(rows), strict=True):
            parts.append(logits)
    for parts, target in zip(got, want, strict=True):
        assert worst_difference(torch.cat(parts), target) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("case", EVERY_ENCODER_DECODER)
def test_answers_to_texts_of_many_lengths_equal_transformers(case, dtype, tolerance, tmp_path):
    theirs = randomized(EVERY_ENCODER_DECODER[case])
    theirs.save_pretrained(tmp_path)
    ours, theirs = Ours(tmp_path, dtype, DEVICE), theirs.to(DEVICE, dtype)
    texts = [[3 + (7 * i + 5 * j) % 128 for j in range(1 + 9 * i)] for i in range(6)]
    answer = [3 + (11 * i) % 128 for i in range(24)]
    ours.read(dict(enumerate(texts)))
    got = [[] for _ in texts]
    for start, end in ((0, 3 * BLOCK + 1), (3 * BLOCK + 1, 22), (22, 23), (23, 24)):
        rows = [row(i, answer, start, end, list(range(1 + 6 * i, 7 + 6 * i))) for i in range(6)]
        for parts, logits in zip(got, ours.logits(rows), strict=True):
            parts.append(logits)
    for parts, text in zip(got, texts, strict=True):
        with torch.inference_mode():
            want = theirs(
                input_ids=torch.tensor([text], device=DEVICE), decoder_input_ids=torch.tensor([answer], device=DEVICE)
            ).logits[0]  # fmt: skip
        assert worst_difference(torch.cat(parts), want.float().cpu()) < tolerance


def test_a_seeded_draw_on_the_device_equals_the_draw_on_the_cpu(tmp_path):
    randomized(CASES["llama"]).save_pretrained(tmp_path)
    sampling = SamplingParams(do_sample=True, temperature=0.8, top_p=0.95, seed=3)
    texts = []
    for device in ("cuda", "cpu"):
        runner = load_runner(
            RunnerOptions(model_dir=str(tmp_path), device=device, dtype="float32", max_rows=4, max_step_tokens=64,
                          max_total_tokens=64, kv_cache_bytes=1 << 20 if device == "cpu" else None)
        )  # fmt: skip
        known, started = [5, 6, 7], [NewRow(sequence_id=1, token_ids=[5, 6, 7], prompt_length=3, sampling=sampling)]
        for _ in range(32):
            position = 0 if started else len(known) - 1
            plan_row = Row(
                sequence_id=1, token_ids=known[position:], position=position, block_table=[1, 2, 3], sample=True
            )
            runner.submit(StepPlan(rows=[plan_row], started=started))
            started = []
            known.append(runner.collect().rows[0].choice.token_id)
        texts.append(known)
    # The noise is the same on both; only a near tie of the logits may part them, and then everything after it differs.
    same = sum(a == b for a, b in zip(*texts, strict=True))
    assert same >= 20
