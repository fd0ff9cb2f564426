"""What the tests of the demo worlds share: the turns of a row, and a digest of a whole folder."""

import hashlib
from pathlib import Path


def asked(row: dict) -> list[tuple[str, str]]:
    """Return the (question, answer) pairs of a LLaVA row."""
    values = [turn["value"] for turn in row["conversations"]]
    questions = [value.removeprefix("<image>\n") for value in values[::2]]
    return list(zip(questions, values[1::2], strict=True))


def digest(folder: Path) -> str:
    """Return a hash of the names and the bytes of all files under a folder."""
    content = []
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            name = str(file.relative_to(folder))
            content.append((name, hashlib.sha256(file.read_bytes()).hexdigest()))
    return hashlib.sha256(repr(content).encode()).hexdigest()
