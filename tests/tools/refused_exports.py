"""What the layouts with marks of tiles refuse to write: every test file of one asks the same."""

from dataclasses import replace
from pathlib import Path

import pytest

from config import UserError
from export import export
from inputs.tokenizer import Tokenizer
from model import LLaVA
from tests.tools.small_llava import small


def check_refusals(
    model: LLaVA, tokenizer: Tokenizer, layout: str, folder: Path, changes: dict[str, dict]
):
    """Assert that a layout refuses the changes of a config, and writes nothing.

    changes: the reason that it must give -> the fields that are changed. A model without tokens
    and a connector of another kind are refused, too.
    """
    with pytest.raises(UserError, match="its tokens"):
        export(model, None, layout, folder)
    with pytest.raises(UserError, match="connector mlp2x_gelu"):
        export(small("llama", "siglip"), tokenizer, layout, folder)

    original = model.config
    for reason, change in changes.items():
        model.config = replace(original, **change)
        with pytest.raises(UserError, match=reason):
            export(model, tokenizer, layout, folder)
    model.config = original
    assert not folder.exists()
