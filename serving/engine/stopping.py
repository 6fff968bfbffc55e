"""When a text ends: stop strings, and what of a text may be shown while it may still become one.

Knows no token id, no tokenizer and no request.
"""


class StopStrings:
    """A request's stop strings, as one matcher; empty strings are ignored."""

    def __init__(self, strings: tuple[str, ...]) -> None:
        self._strings = [string for string in strings if string]
        self.longest = max(map(len, self._strings), default=0)

    def find(self, text: str, fresh: int) -> tuple[int, int] | None:
        """The stop string that is complete first, as (start, stop) in `text`.

        Args:
            fresh: text before it was searched already; a match ends after it.
        """
        matches = []
        for string in self._strings:
            start = text.find(string, max(0, fresh - len(string) + 1))
            if start >= 0:
                matches.append((start + len(string), start))
        if not matches:
            return None
        stop, start = min(matches)
        return start, stop

    def overhang(self, text: str) -> int:
        """How many characters at the end of `text` are the beginning of a stop string."""
        return max((_overhang(text, string) for string in self._strings), default=0)


class OutputText:
    """One request's generated text, and the part of it that must wait.

    Args:
        keep_stop_text: the text is cut after a stop string and never held back; otherwise it is cut before one, and
            held back while its end may become one.

    Attributes:
        stopped: whether a stop string was found; nothing is added after that.
    """

    def __init__(self, stop_strings: tuple[str, ...], *, keep_stop_text: bool) -> None:
        self._stop_strings = StopStrings(stop_strings)
        self._keep_stop_text = keep_stop_text
        self._shown_pieces: list[str] = []
        self._tail = ""  # the newest text: enough to complete a stop string, and all that is held back
        self._shown = 0  # characters of the tail that were shown
        self._hidden: list[tuple[int, int]] = []  # spans of the tail that are never shown
        self.stopped = False

    def add(self, piece: str, *, hidden: bool = False) -> str:
        """Append a piece and return what can be shown now.

        Args:
            hidden: the piece takes part in stop strings, but not in the text (a special token's literal text).
        """
        if self.stopped:
            return ""
        if not self._stop_strings.longest:
            return self._show("" if hidden else piece)
        fresh = len(self._tail)
        self._tail += piece
        if hidden:
            self._hidden.append((fresh, len(self._tail)))
        match = self._stop_strings.find(self._tail, fresh)
        if match is None:
            return self._advance(len(self._tail) - self._held())
        start, stop = match
        self.stopped = True
        return self._advance(stop if self._keep_stop_text else start)

    def close(self) -> str:
        """Return what was held back: no text follows that could make it a stop string."""
        return "" if self.stopped else self._advance(len(self._tail))

    def whole(self) -> str:
        """All that was shown."""
        return "".join(self._shown_pieces)

    def _held(self) -> int:
        return 0 if self._keep_stop_text else self._stop_strings.overhang(self._tail)

    def _advance(self, until: int) -> str:
        piece = self._visible(self._shown, until)
        self._shown = max(self._shown, until)
        needless = min(self._shown, len(self._tail) - self._stop_strings.longest + 1)
        if needless > 0:
            self._tail = self._tail[needless:]
            self._shown -= needless
            self._hidden = [(max(0, a - needless), b - needless) for a, b in self._hidden if b > needless]
        return self._show(piece)

    def _visible(self, start: int, stop: int) -> str:
        pieces = []
        for hidden_start, hidden_stop in self._hidden:
            if start < hidden_stop:
                pieces.append(self._tail[start : min(hidden_start, stop)])
                start = hidden_stop
        pieces.append(self._tail[start:stop])
        return "".join(pieces)

    def _show(self, piece: str) -> str:
        if piece:
            self._shown_pieces.append(piece)
        return piece


def _overhang(text: str, string: str) -> int:
    start = max(0, len(text) - len(string) + 1)
    while (start := text.find(string[0], start)) >= 0:
        if string.startswith(text[start:]):
            return len(text) - start
        start += 1
    return 0
