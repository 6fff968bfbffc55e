"""The rules that requests are held to: their words and, by how they are called, their order.

Knows no text but a prompt's emptiness: tokenising, rendering and grammars are the validator's.
"""

from collections.abc import Callable, Mapping, Sequence

from serving.errors import SuffixNotSupported, TooManyPrompts, ValidationError
from serving.validation.parameters import Limits, Parameters


class Rules:
    """What holds for the parameters of one model's requests. Every method raises ValidationError.

    Args:
        vocab_size: ids are below it.
        prefill_logprobs: whether log probabilities of prompts may be asked for.
        longest_answer: tokens of one, whatever it answers; `None` where input and answer share one length.
    """

    def __init__(
        self, limits: Limits, *, vocab_size: int, prefill_logprobs: bool, longest_answer: int | None = None
    ) -> None:
        self._limits, self._longest_answer = limits, longest_answer
        self._vocab_size = vocab_size
        self._prefill_logprobs = prefill_logprobs

    def samples(self, parameters: Parameters, *, stream: bool, prompts: int = 1) -> int:
        """How many answers each prompt needs; cheap, to be known before anything is taken for the request.

        Raises:
            SuffixNotSupported: the answer shall have something behind it.
            TooManyPrompts: more than allowed.
            ValidationError: more answers than allowed, or not allowed in a stream.
        """
        self._check_batch(parameters, prompts)
        best_of, n, most = parameters.best_of, parameters.n, self._limits.max_best_of
        if stream:
            if best_of is not None and best_of != (n or 1):
                raise ValidationError("`best_of` != 1 is not supported when streaming tokens")
            if parameters.decoder_input_details:
                raise ValidationError("`decoder_input_details` == true is not supported when streaming tokens")
        if best_of is not None and best_of > 1:
            if most == 1:
                raise ValidationError("`best_of` != 1 is not allowed for this endpoint")
            if best_of > most:
                raise ValidationError(f"`best_of` must be > 0 and <= {most}. Given: {best_of}")
        if n is not None and not 0 < n <= most:
            raise ValidationError(f"`n` must be > 0 and <= {most}. Given: {n}")
        if n is not None and best_of is not None and best_of < n:
            raise ValidationError(f"`best_of` must be >= `n`. Given: {best_of} and {n}")
        return max(best_of or 1, n or 1)

    def _check_batch(self, parameters: Parameters, prompts: int) -> None:
        if parameters.suffix is not None:
            raise SuffixNotSupported
        if prompts > self._limits.max_client_batch_size:
            raise TooManyPrompts(self._limits.max_client_batch_size)

    def check(self, text: str, given: Parameters) -> dict[int, float]:
        """Every rule that needs no tokens, in the original's order; returns the biases by token id.

        Args:
            text: the prompt's.
        """
        self._check_numbers(given)
        self._check_stops(given)
        logit_bias = self._logit_bias(given.logit_bias)
        if given.n is None and given.seed is not None and (given.best_of or 1) > 1:
            raise ValidationError("`seed` must not be set when `best_of` > 1")
        self._check_input(text, given)
        return logit_bias

    def _check_numbers(self, given: Parameters) -> None:
        warped = (given.temperature, given.top_k, given.top_p, given.typical_p)
        best_of = (given.best_of or 1) if given.n is None else 1
        if best_of > 1 and not given.do_sample and all(value is None for value in warped):
            raise ValidationError("you must use sampling when `best_of` is > 1")
        _check(given.temperature, lambda value: value > 0, "`temperature` must be strictly positive")
        _check(given.repetition_penalty, lambda value: value > 0, "`repetition_penalty` must be strictly positive")
        for penalty in (given.relative_frequency_penalty, given.frequency_penalty):
            _check(penalty, lambda value: -2 <= value <= 2, "`frequency_penalty` must be >= -2.0 and <= 2.0")
        _check(given.top_p, lambda value: 0 < value <= 1, "`top_p` must be > 0.0 and < 1.0")
        _check(given.typical_p, lambda value: 0 < value <= 1, "`typical_p` must be > 0.0 and < 1.0")
        _check(given.top_k, lambda value: value > 0, "`top_k` must be strictly positive")
        _check(given.max_new_tokens, lambda value: value > 0, "`max_new_tokens` must be strictly positive")
        _check(
            given.presence_penalty,
            lambda value: -2 <= value <= 2,
            "`presence_penalty` must be >= -2.0 and <= 2.0",
        )
        _check(given.min_p, lambda value: 0 <= value <= 1, "`min_p` must be >= 0.0 and <= 1.0")

    def _check_stops(self, given: Parameters) -> None:
        limits, count = self._limits, len(given.stop)
        if count > limits.max_stop_sequences:
            raise ValidationError(f"`stop` supports up to {limits.max_stop_sequences} stop sequences. Given: {count}")
        if any(len(text) > limits.max_stop_length for text in given.stop):
            raise ValidationError(f"`stop` sequences must have at most {limits.max_stop_length} characters")
        if len(given.stop_token_ids) > limits.max_stop_token_ids:
            raise ValidationError(f"`stop_token_ids` must have at most {limits.max_stop_token_ids} entries")
        if any(token_id >= self._vocab_size for token_id in given.stop_token_ids):
            raise ValidationError(f"`stop_token_ids` must be < {self._vocab_size}")

    def _logit_bias(self, given: Mapping[str, float]) -> dict[int, float]:
        if len(given) > self._limits.max_logit_bias:
            raise ValidationError(f"`logit_bias` must have at most {self._limits.max_logit_bias} entries")
        bias: dict[int, float] = {}
        for name, value in given.items():
            if not (name.isascii() and name.isdigit() and len(name) <= 10 and int(name) < self._vocab_size):
                raise ValidationError(f"`logit_bias` keys must be token ids < {self._vocab_size}")
            if not -100 <= value <= 100:
                raise ValidationError("`logit_bias` values must be >= -100.0 and <= 100.0")
            bias[int(name)] = value
        return bias

    def _check_input(self, text: str, given: Parameters) -> None:
        limits = self._limits
        if given.top_n_tokens is not None and given.top_n_tokens > limits.max_top_n_tokens:
            raise ValidationError(
                f"`top_n_tokens` must be >= 0 and <= {limits.max_top_n_tokens}. Given: {given.top_n_tokens}"
            )
        if not text:
            raise ValidationError("`inputs` cannot be empty")
        if given.prompt_logprobs and not self._prefill_logprobs:
            raise ValidationError("`echo` with `logprobs` needs a server that runs with `--enable-prefill-logprobs`")
        if given.truncate is not None and not 0 < given.truncate <= limits.max_input_tokens:
            raise ValidationError(
                f"`truncate` must be strictly positive and less than {limits.max_input_tokens}. Given: {given.truncate}"
            )

    def checked_ids(self, token_ids: list[int], truncate: int | None) -> list[int]:
        """The last `truncate` ids; there has to be one, and all of them in the vocabulary."""
        if truncate is not None:
            token_ids = token_ids[-truncate:]
        if not token_ids:
            raise ValidationError("`inputs` cannot be empty")
        self.check_known(token_ids)
        return token_ids

    def check_known(self, token_ids: Sequence[int]) -> None:
        """Every id has to be in the vocabulary."""
        if max(token_ids, default=0) >= self._vocab_size:
            raise ValidationError("`inputs` contains a token that the model does not know")

    def max_new_tokens(self, input_length: int, given: int | None) -> int:
        """How long an answer may become: as was asked, or else until the context is full."""
        limits = self._limits
        most = max(0, limits.max_total_tokens - input_length)
        if self._longest_answer is not None:
            most = min(most, self._longest_answer)
        max_new_tokens = most if given is None else given
        if input_length + max_new_tokens > limits.max_total_tokens:
            raise ValidationError(
                f"`inputs` tokens + `max_new_tokens` must be <= {limits.max_total_tokens}. "
                f"Given: {input_length} `inputs` tokens and {max_new_tokens} `max_new_tokens`"
            )
        if input_length > limits.max_input_tokens:
            raise ValidationError(
                f"`inputs` must have less than {limits.max_input_tokens} tokens. Given: {input_length}"
            )
        if self._longest_answer is not None and max_new_tokens > self._longest_answer:
            raise ValidationError(
                f"`max_new_tokens` must be <= {self._longest_answer}, which is as far as the positions of the model's "
                f"decoder go. Given: {max_new_tokens}"
            )
        return max_new_tokens


def _check(value: float | None, holds: Callable[[float], bool], detail: str) -> None:
    if value is not None and not holds(value):
        raise ValidationError(detail)
