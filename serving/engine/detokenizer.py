"""Token ids to text, one id at a time.

Knows no stop string and no request: what may be shown of the text is decided elsewhere.
"""

from serving.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
CONTEXT_TOKENS = 5
# No character has more than four bytes, so its last one comes with the fourth token at the latest.
LONGEST_CHARACTER = 4
LONGEST_WINDOW = 8
LONGEST_UNSETTLED_WINDOW = 32


class Detokenizer:
    """Decodes a growing sequence; a token costs two decodes of a few ids at most, however long the text is.

    A token's text depends on its neighbours (leading spaces, characters of several tokens), so a short window of
    the newest ids is decoded and what was given out before is left off: Hugging Face's "prefix and read offset"
    method. The window is shortened at ends of whole characters only: a byte-fallback decoder takes a run of bytes
    for broken as a whole. A prompt's last tokens open the window, as far as no special token follows them.

    Args:
        prompt_token_ids: whose continuation is decoded; only the end is looked at.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        for token_id in prompt_token_ids[-CONTEXT_TOKENS:]:
            if tokenizer.is_special(token_id):
                self._window.clear()
            else:
                self._window.append(token_id)
        self._fresh = True
        self._given = 0  # characters of the window's text that were given out
        self._settled = 0  # ids of the window at the last end of a whole character
        self._pending = 0  # ids since then

    def push(self, token_id: int) -> str:
        """The text that an ordinary token adds: "" inside an incomplete character, which comes with its last token.

        Special tokens must not be pushed: they do not take part in the text.
        """
        if self._fresh:
            self._open()
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        if not text.endswith(REPLACEMENT):
            new = text[self._given :]
            self._settle(text)
            return new
        self._pending += 1
        return self._force(text) if self._pending >= LONGEST_CHARACTER else ""

    def flush(self) -> str:
        """The text still waiting when no token follows, without the beginning of an incomplete character."""
        if not self._pending:
            return ""
        self._pending = 0
        return self._tokenizer.decode(self._window).rstrip(REPLACEMENT)[self._given :]

    def _open(self) -> None:
        """Take the prompt's last tokens for given out, from the first whole character on."""
        text = self._tokenizer.decode(self._window)
        while text.startswith(REPLACEMENT):
            del self._window[0]
            text = self._tokenizer.decode(self._window)
        self._fresh = False
        self._given = len(text)
        self._settled = len(self._window)

    def _settle(self, text: str) -> None:
        self._pending = 0
        self._given = len(text)
        if len(self._window) >= LONGEST_WINDOW:
            del self._window[: self._settled]
            self._given = len(self._tokenizer.decode(self._window))
        self._settled = len(self._window)

    def _force(self, text: str) -> str:
        """Give out what cannot become a character any more, though the text does not end in a whole one."""
        whole = len(text.rstrip(REPLACEMENT))
        if whole > self._given and len(self._window) < LONGEST_UNSETTLED_WINDOW:
            new = text[self._given : whole]
            self._given = whole
            self._pending = 1
            return new
        tail = self._window[1 - LONGEST_CHARACTER :]
        broken = self._tokenizer.decode(self._window[: -len(tail)])[self._given :]
        self._window = tail
        self._given = 0
        self._settled = 0
        self._pending = len(tail)
        text = self._tokenizer.decode(tail)
        if text.endswith(REPLACEMENT):
            return broken
        self._settle(text)
        return broken + text
