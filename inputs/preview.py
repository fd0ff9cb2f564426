"""The pieces of a preview: a sample's text with what is supervised marked, pictures, a whole page.

    text, answers, marks = templates.render(conversation, templates.resolve("phi", tok))
    _, labels, offsets = templates.tokenize(text, answers, marks, tok)
    print(show_supervised(text, labels, offsets, colour=False))
    # USER: Who? ASSISTANT:[[ A dog.<|endoftext|>]]

`show_supervised` is for a terminal, `mark_supervised` for a page. A page is `html_page` around a
body. Its pictures, made by `image_tag`, are inside it, so it is one file and needs no network.
"""

import base64
import html
import io
import unicodedata

from PIL import Image

from packing import IGNORE

# What a terminal obeys: colour on, colour off.
GREEN = "\033[32m"
PLAIN = "\033[0m"


def split_supervised(
    text: str, labels: list[int], offsets: list[tuple[int, int]]
) -> list[tuple[str, bool]]:
    """Return the text as runs of characters of one kind: [(characters, whether supervised)].

    Labels and offsets are those of its tokens, from `templates.tokenize`. A terminal would obey
    control characters in the data, so a run has their escapes in place of them, as \\033.
    """
    supervised = [False] * len(text)
    for label, (start, end) in zip(labels, offsets, strict=True):
        if label != IGNORE:
            supervised[start:end] = [True] * (end - start)

    # A run ends where the next character is of the other kind, and at the end of the text.
    runs = []
    begin = 0
    for at in range(1, len(text) + 1):
        if at == len(text) or supervised[at] != supervised[begin]:
            characters = escape_controls(text[begin:at])
            runs.append((characters, supervised[begin]))
            begin = at
    return runs


def escape_controls(text: str) -> str:
    """Return a text without characters that steer a terminal or turn the direction of writing."""
    safe = []
    for character in text:
        kind = unicodedata.category(character)
        if kind == "Cc" and character not in "\n\t":
            safe.append(f"\\{ord(character):03o}")  # octal, as in C
        elif kind in ("Cf", "Cs"):
            safe.append(f"\\u{ord(character):04x}")
        else:
            safe.append(character)
    return "".join(safe)


def show_supervised(
    text: str, labels: list[int], offsets: list[tuple[int, int]], colour: bool
) -> str:
    """Return the text for a terminal, supervised characters in green or between [[ and ]]."""
    if colour:
        opening, closing = GREEN, PLAIN
    else:
        opening, closing = "[[", "]]"

    shown = []
    for characters, supervised in split_supervised(text, labels, offsets):
        if supervised:
            shown.append(opening + characters + closing)
        else:
            shown.append(characters)
    return "".join(shown)


def mark_supervised(text: str, labels: list[int], offsets: list[tuple[int, int]]) -> str:
    """Return the text as HTML, supervised characters inside <mark>."""
    shown = []
    for characters, supervised in split_supervised(text, labels, offsets):
        escaped = html.escape(characters)
        if supervised:
            shown.append(f"<mark>{escaped}</mark>")
        else:
            shown.append(escaped)
    return "".join(shown)


def encode_png(image: Image.Image) -> bytes:
    """Return the bytes of the picture as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def image_tag(image: Image.Image | bytes, width: int) -> str:
    """Return an <img> that holds the picture itself, shown `width` pixels wide.

    `image` is a PIL image or the bytes of a PNG file.
    """
    if isinstance(image, Image.Image):
        image = encode_png(image)
    data = base64.b64encode(image).decode()
    return f'<img src="data:image/png;base64,{data}" width="{width}" alt="">'


def html_page(title: str, body: str, style: str = "") -> str:
    """Return a whole page. `title` is plain text, `body` is HTML and `style` CSS."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{style}</style></head>
<body>
{body}
</body></html>
"""
