"""Run the blocks of a chapter, so that a figure is drawn from the very tensors that it shows."""

import contextlib
import functools
import io

from guide.blocks import GUIDE, read_blocks


@functools.cache  # several figures of a chapter share one run
def names_after(chapter: str, line: str) -> dict:
    """Return the names of a chapter's python blocks, up to and with the block that has a line.

    chapter: its file, "07-stages.md". Blocks with a tag, quotes, and blocks that must fail are left
    out. Raises ValueError if no block has the line.
    """
    names = {}
    for block in read_blocks(GUIDE / chapter):
        is_run = block.language == "python" and not block.source
        if not is_run or block.tags or "raises" in block.options:
            continue
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(block.text, block.where, "exec"), names)
        if line in block.text:
            return names
    raise ValueError(f"no block of {chapter} has {line!r}")
