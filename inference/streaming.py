"""Show the text of an answer while it is made, in spite of stop strings and split characters.

    text = TextStream(tokenizer.decode, stop=["\\n"])
    for tokens in ...:  # all tokens of the answer so far
        print(text.update(tokens), end="")
        if text.stopped:
            break
    print(text.finish())

A token is not a whole number of characters. It may end in the middle of a character whose other
bytes come with the next token, and a stop string may be spread over several tokens. So the end of
what has been decoded is shown only when the tokens that follow cannot change it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

# What decoders write in place of bytes that are no character (yet).
INCOMPLETE = "\ufffd"


class TextStream:
    """One answer that grows by tokens and is read in pieces of text.

    decode: from tokens to text. stop: strings that end the answer; they are left out of it.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()):
        self.decode = decode
        self.stop = stop
        self.text = ""  # the answer so far, up to a stop string
        self.stopped = False  # whether it contains one
        self.shown = 0  # how many of its characters have been returned

    def update(self, tokens: list[int]) -> str:
        """Return the piece of text that can be shown now; tokens are all those of the answer."""
        # Decoded as a whole each time: the text of a token depends on the tokens around it.
        text = self.decode(tokens)

        end = first_stop(text, self.stop)
        if end is not None:
            self.text = text[:end]
            self.stopped = True
            return self._show(end)

        self.text = text
        if text.endswith(INCOMPLETE):
            return ""

        # Hold back what may become a stop string.
        certain = len(text) - possible_stop(text, self.stop)
        return self._show(certain)

    def finish(self) -> str:
        """Return what has waited for more tokens. The answer is complete, so none will come."""
        return self._show(len(self.text))

    def _show(self, end: int) -> str:
        """Return the text up to `end` that has not been returned before."""
        piece = self.text[self.shown : end]
        # Never back, so that no character is returned twice.
        self.shown = max(self.shown, end)
        return piece


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Return where the first stop string in the text begins, or None if there is none."""
    found = [text.find(stop) for stop in stops if stop in text]
    return min(found, default=None)


def possible_stop(text: str, stops: Sequence[str]) -> int:
    """Return how many characters at the end of a text may be the beginning of a stop string."""
    longest = 0
    # A whole stop string is not among them: `first_stop` has looked for it before.
    for stop in stops:
        for length in range(1, len(stop)):
            if text.endswith(stop[:length]):
                longest = max(longest, length)
    return longest
