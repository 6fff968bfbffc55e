"""A sequence: the mutable life of one request in the engine.

Knows no other sequence, no queue and no device.
"""

from dataclasses import dataclass, field

from serving.engine.detokenizer import Detokenizer
from serving.engine.stopping import OutputText
from serving.protocol import Request, Session
from serving.tokenizer import Tokenizer

SUSPECT_DEATHS = 2


@dataclass(slots=True, eq=False)
class Sequence:
    """What is known and what is computed of one request; there are no phases beside that.

    Attributes:
        id: the request's number; also the device's name for the sequence.
        token_ids: the prompt and what was generated.
        end_ids: ids that end the generation as end-of-sequence tokens do.
        most_tokens: what the prompt, the text that an encoder reads, and the answer can come to.
        arrived: `time.monotonic()` of when the request was handed to the engine.
        begun: `time.monotonic()` of the first step that took the request in.
        latest: `time.monotonic()` of the newest token.
        computed: how many of `token_ids` the device holds keys and values for.
        blocks: where they are, in order; never more blocks than the planned positions need.
        digests: the prefix cache's names of the full blocks of `token_ids`, as far as they were asked for.
        remembered: how many of `blocks` were offered to the prefix cache.
        running: whether the scheduler has taken the sequence out of the queue.
        on_device: whether the device was told of the sequence.
        refused: free blocks and running sequences when there was no room for this one.
        deaths: device deaths with the sequence in the plan, since its last token.
        prompt_logprobs: of the prompt's second token and those after it, as far as computed.
        session: which one keeps the blocks, if any; None as well once it was closed.
    """

    id: int
    request: Request
    token_ids: list[int]
    end_ids: frozenset[int]
    detokenizer: Detokenizer
    text: OutputText
    arrived: float
    most_tokens: int
    begun: float | None = None
    latest: float | None = None
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    remembered: int = 0
    running: bool = False
    on_device: bool = False
    refused: tuple[int, int] | None = None
    deaths: int = 0
    prompt_logprobs: list[float] = field(default_factory=list)
    session: Session | None = None

    @classmethod
    def start(
        cls, request_id: int, request: Request, *, tokenizer: Tokenizer, eos_token_ids: frozenset[int], arrived: float
    ) -> "Sequence":
        """A sequence of which the prompt is known and nothing is computed."""
        stop = request.stop
        return cls(
            id=request_id,
            request=request,
            token_ids=list(request.prompt_token_ids),
            # Under a grammar only what may end there is an end-of-sequence token, and nothing can follow it.
            end_ids=frozenset(stop.stop_token_ids)
            | (frozenset() if stop.ignore_eos and request.sampling.grammar is None else eos_token_ids),
            detokenizer=Detokenizer(tokenizer, request.prompt_token_ids),
            text=OutputText(stop.stop_strings, keep_stop_text=stop.keep_stop_text),
            arrived=arrived,
            most_tokens=len(request.prompt_token_ids) + len(request.encoder_token_ids) + stop.max_new_tokens,
            session=request.session,
        )

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def unread(self) -> int:
        """Tokens that the device's encoder has still to read."""
        return 0 if self.on_device else len(self.request.encoder_token_ids)

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def pending(self) -> int:
        """Tokens known but not computed."""
        return len(self.token_ids) - self.computed

    def overdue(self, now: float) -> bool:
        """Whether the request's deadline has passed."""
        return self.request.deadline is not None and self.request.deadline <= now

    @property
    def suspect(self) -> bool:
        """Whether one more device death gives the sequence up, so that it had better be computed alone."""
        return self.deaths >= SUSPECT_DEATHS

    @property
    def wants_prompt_logits(self) -> bool:
        """Whether every position of the prompt must be computed, even one that the prefix cache holds."""
        return self.request.sampling.prompt_logprobs and len(self.prompt_logprobs) < self.prompt_length - 1

    def forget_device(self) -> None:
        """Start over on a new device: nothing is computed, all tokens stay known."""
        self.computed = 0
        self.blocks = []
        self.digests = []
        self.remembered = 0
        self.running = False
        self.on_device = False
        self.refused = None
