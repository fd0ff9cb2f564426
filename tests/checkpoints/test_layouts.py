"""What a config.json must say, whatever its layout."""

import pytest

from model import LLaVA


def test_unknown_layout_and_incomplete_config_are_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llavaa"}')
    with pytest.raises(ValueError, match="no layout known here; fix: one of barellava, tinyllava"):
        LLaVA.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "tinyllava", "text_config": {}}')
    with pytest.raises(ValueError, match="vision_config: missing"):
        LLaVA.from_pretrained(tmp_path)
