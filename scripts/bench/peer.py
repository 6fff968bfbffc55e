"""The peer every figure is a ratio to: transformers' `generate`, as its documentation has one use it.

Knows nothing of ours but the jobs.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from scripts.bench.offline import Outcome
from scripts.bench.workloads import Job


class Generate:
    """`generate` in bfloat16: one static batch, padded on the left, run until the longest answer is whole.

    Args:
        device: where it computes: "cpu" or "cuda".
    """

    def __init__(self, model_dir: Path, device: str) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).to(device).eval()
        # Ours ignores the end of sequence as well; held back by `min_new_tokens` it could not be chosen at all.
        self._model.generation_config.eos_token_id = None
        self._device = device

    @torch.inference_mode()
    def run(self, jobs: Sequence[Job]) -> Outcome:
        """Generate for all jobs together; only the tokens that were wanted count."""
        width = max(len(job.prompt) for job in jobs)
        wanted = max(job.wanted for job in jobs)
        begun = time.perf_counter()
        pads = [width - len(job.prompt) for job in jobs]
        ids = torch.tensor([[0] * pad + job.prompt for pad, job in zip(pads, jobs, strict=True)], device=self._device)
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads], device=self._device)
        output = self._model.generate(
            ids, attention_mask=mask, do_sample=False, min_new_tokens=wanted, max_new_tokens=wanted, pad_token_id=0
        )
        answers = output[:, width:].tolist()
        elapsed_s = time.perf_counter() - begun
        tokens = [answer[: job.wanted] for answer, job in zip(answers, jobs, strict=True)]
        return Outcome(tokens, elapsed_s, elapsed_s, wanted, 0)
