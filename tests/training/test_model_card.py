"""What a finished run writes for people: README.md and the curve of its loss."""

from PIL import Image

from tests.tools.environment import run
from tests.tools.training_runs import SHORT


def test_a_finished_folder_tells_how_it_went(recipe):
    file, out = recipe("card")
    run("train.py", file, *SHORT)
    card = (out / "README.md").read_text()
    for name, steps in (("pretrain", 2), ("finetune", 4)):
        assert any(
            line.startswith(f"| {name} | ") and f" | {steps} | " in line
            for line in card.splitlines()
        )
    assert "llm partial:1, connector full" in card and "random weights, llama" in card
    colours = {c for _, c in Image.open(out / "loss.png").getcolors(1 << 16)}
    assert {(0x33, 0x66, 0xCC), (0xDC, 0x39, 0x12)} <= colours  # a line for each stage
