"""From a growing list of token ids to text that can be shown at once, and stop strings that never are.

Each token's bytes go through one incremental UTF-8 decoder, so the cost is linear in the text, half a character is
never shown, and nothing that came before the completion can leak into it.
"""

import codecs
from collections.abc import Sequence

from model.text.tokenizer import Tokenizer


class Detokenizer:
    """The text of one completion.

    stop: the completion ends before the first of these to appear, wherever tokens or bytes divide it.
    min_tokens: of that many tokens all but the last may not end it; what they say is never taken for a stop string.
    stopped: one of them has appeared; `num_tokens` of the tokens fed were needed to know.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self.stopped = False
        self.num_tokens = 0
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # the end of the text, which may be the beginning of a stop string

    def feed(self, token_ids: Sequence[int]) -> str:
        """Take in new tokens and return the text that has become certain. Tokens behind a stop string are ignored."""
        shown = []
        for token_id in token_ids:
            if self.stopped:
                break
            self.num_tokens += 1
            shown.append(self._release(self._utf8.decode(self._tokenizer.token_bytes(token_id))))
        return "".join(shown)

    def flush(self) -> str:
        """At the end of the completion: the text that was held back."""
        if self.stopped:
            return ""
        shown = self._release(self._utf8.decode(b"", final=True))
        if not self.stopped:
            shown, self._held = shown + self._held, ""
        return shown

    def _release(self, new: str) -> str:
        """Add new text to what is held; return what can no longer become part of a stop string."""
        if self.num_tokens < self._min_tokens:
            return new
        text = self._held + new
        found = min((index for stop in self._stop if (index := text.find(stop)) >= 0), default=None)
        if found is not None:
            self.stopped, self._held = True, ""
            return text[:found]
        keep = len(text) - self._possible_stop(text)
        self._held = text[keep:]
        return text[:keep]

    def _possible_stop(self, text: str) -> int:
        """Length of the longest end of the text that is the beginning of a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
