"""What crosses to the device: a plan of integers down, chosen tokens up, and the contract of whoever executes it.

Knows no tensor (the words wing reads this) and no queue (the tensors wing reads this).
"""

from typing import Protocol

from msgspec import Struct

from serving.protocol import SamplingParams


class NewAdapter(Struct, frozen=True, array_like=True):
    """A LoRA adapter for the device to load.

    Attributes:
        number: at least 1, and never used for another adapter.
        directory: holds adapter_config.json and adapter_model.safetensors.
    """

    number: int
    directory: str


class NewRow(Struct, frozen=True, kw_only=True, array_like=True):
    """What the device must remember of a sequence, sent once before its first row.

    Attributes:
        token_ids: everything known so far: the prompt, and what was generated if the sequence moves to a new runner.
        prompt_length: how many of `token_ids` are the prompt.
        encoder_token_ids: the text that an encoder-decoder's encoder reads; empty for a decoder alone.
        adapter: the number of the loaded adapter that it is computed with; 0 for the model as it is.
    """

    sequence_id: int
    token_ids: list[int]
    prompt_length: int
    sampling: SamplingParams
    encoder_token_ids: list[int] = []
    adapter: int = 0


class Row(Struct, frozen=True, kw_only=True, array_like=True):
    """One sequence's part of a step: a chunk of its prompt, or its newest token.

    Attributes:
        token_ids: what to compute now, at least one id.
        position: where `token_ids[0]` stands in the sequence.
        block_table: the blocks that hold positions 0 to `position + len(token_ids) - 1`, in order.
        sample: whether the row's last token ends what is known, so that the next one is to be chosen.
    """

    sequence_id: int
    token_ids: list[int]
    position: int
    block_table: list[int]
    sample: bool


class StepPlan(Struct, frozen=True, kw_only=True, array_like=True):
    """One forward: `started` is taken in first, then `rows` are computed, `finished` is forgotten before both.

    Attributes:
        dropped: numbers of adapters that no row uses any more; they are forgotten next.
        adapters: to be loaded then, before `started` is taken in.
    """

    rows: list[Row]
    started: list[NewRow] = []
    finished: list[int] = []
    dropped: list[int] = []
    adapters: list[NewAdapter] = []


class Choice(Struct, frozen=True, array_like=True):
    """The token chosen for a row.

    Attributes:
        logprob: natural log of its probability under the fully processed logits.
        top: (id, logprob) of the best alternatives, best first, when the sequence asked for them.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = []


class RowResult(Struct, frozen=True, kw_only=True, array_like=True):
    """What became of one row.

    Attributes:
        choice: set exactly when the row had `sample`, unless it is `waiting` or has an error.
        prompt_logprobs: for the prompt positions `position + 1` to `position + len(token_ids)`, as far as they
            are prompt; empty unless asked for.
        waiting: the device is not ready to choose; the row's last token is to be computed once more.
        error: why no token can be chosen for this sequence, ever; the other rows are as good as without it.
    """

    sequence_id: int
    choice: Choice | None = None
    prompt_logprobs: list[float] = []
    waiting: bool = False
    error: str | None = None


class StepResult(Struct, frozen=True, kw_only=True, array_like=True):
    """The results of a plan's rows, in their order.

    Attributes:
        refused: by its number, why an adapter of the plan was not loaded; nothing is left of it.
    """

    rows: list[RowResult]
    refused: dict[int, str] = {}


class ModelFacts(Struct, frozen=True, kw_only=True, array_like=True):
    """What the device measured once the model was loaded; travels up.

    Attributes:
        max_position: positions that the model was made for; with an encoder, those of both texts together.
        block_size: tokens a KV block holds.
        block_count: KV blocks there are; block 0 is never handed out (padding writes go there).
        max_step_tokens: the largest number of tokens that one step was measured with.
        max_rows: the largest number of rows that one step was measured with.
        dtype: the computing type, such as "bfloat16".
        device: what computes, such as "cpu" or "nvidia-h200".
        weight_bytes: bytes of the kept weights, on all devices.
        kv_bytes: bytes of the KV cache, on all devices, and of what is kept there of the texts of encoders.
        rank_count: how many devices share the model out.
        max_encoder_tokens: the longest text that an encoder was measured with; 0 where there is no encoder.
        max_decoder_tokens: likewise the longest that is written about it, with the token that it begins with.
    """

    vocab_size: int
    max_position: int
    block_size: int
    block_count: int
    max_step_tokens: int
    max_rows: int
    dtype: str
    device: str
    weight_bytes: int
    kv_bytes: int
    rank_count: int = 1
    max_encoder_tokens: int = 0
    max_decoder_tokens: int = 0

    @property
    def kv_tokens(self) -> int:
        """Tokens whose keys and values there is room for."""
        return (self.block_count - 1) * self.block_size


class Runner(Protocol):
    """One device (or N that act as one) with a loaded model.

    Plans may be submitted before earlier results were collected; results come in the order of the plans.
    """

    @property
    def facts(self) -> ModelFacts:
        """What was measured when the model was loaded."""
        ...

    def submit(self, plan: StepPlan) -> None:
        """Hand a plan over. Raises RunnerDied."""
        ...

    def collect(self) -> StepResult:
        """Wait for the oldest submitted plan's result. Raises RunnerDied."""
        ...

    def alive(self) -> bool:
        """Whether the device can still be used; never blocks."""
        ...

    def close(self) -> None:
        """Let go of the device; ends the process where there is one. Safe to call twice."""
        ...
