"""What lies beside a finished model to tell how it came about: README.md and loss.png.

    finish(output, recipe)

Both are made of log.jsonl and the recipe. The numbers of the card are the last ones of each stage.
"""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image, ImageDraw

from checkpoints.files import write_file
from config import Model, Recipe, Stage

WIDTH, HEIGHT = 900, 420  # pixels of loss.png
EDGE = 50  # pixels around the plot
COLOURS = ("#3366cc", "#dc3912", "#109618", "#990099", "#ff9900")  # one per stage


def finish(output: Path, recipe: Recipe):
    """Write loss.png and README.md into the folder of a finished model."""
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    draw_losses(log, output / "loss.png")
    write_file(output / "README.md", card(recipe, log))


# -------------------------------------------------------------------------------------- the picture


def draw_losses(log: list[dict], file: Path):
    """Draw the stages one after the other: the training loss as a line, validation as dots."""
    points = [row for row in log if row["event"] in ("step", "validation")]
    if not points:
        return
    highest = max(row["loss"] for row in points)

    # A stage begins, on the x axis, where the one before ended.
    begins = {}
    total = 0
    for name in dict.fromkeys(row["stage"] for row in points):
        begins[name] = total
        total += max(row["step"] for row in points if row["stage"] == name)

    def place(row: dict) -> tuple[float, float]:
        x = (begins[row["stage"]] + row["step"]) / total
        y = row["loss"] / highest
        return EDGE + x * (WIDTH - 2 * EDGE), HEIGHT - EDGE - y * (HEIGHT - 2 * EDGE)

    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    bottom, right = HEIGHT - EDGE, WIDTH - EDGE
    draw.line([(EDGE, EDGE), (EDGE, bottom), (right, bottom)], "black")
    draw.text((4, EDGE - 6), f"{highest:.2f}", "black")
    draw.text((4, bottom - 6), "0.00", "black")
    draw.text((right - 30, bottom + 6), f"{total} steps", "black")

    for i, name in enumerate(begins):
        colour = COLOURS[i % len(COLOURS)]
        of_stage = [row for row in points if row["stage"] == name]
        draw.line([place(row) for row in of_stage if row["event"] == "step"], colour, 2)
        for row in of_stage:
            if row["event"] == "validation":
                x, y = place(row)
                draw.ellipse([x - 3, y - 3, x + 3, y + 3], colour)
        draw.text((EDGE + 10 + 160 * i, 14), f"{name} (dots: validation)", colour)
    write_file(file, lambda path: image.save(path, "PNG"))


# ----------------------------------------------------------------------------------------- the card


def card(recipe: Recipe, log: list[dict]) -> str:
    """Return README.md: what the model is made of, what it saw, how it scored, how to open it."""
    lines = [f"# {Path(recipe.train.output).name}", ""]
    lines += _parts(recipe.model)
    lines += [
        "",
        "| stage | data | trains | steps | loss | validation loss |",
        "|---|---|---|---|---|---|",
    ]
    for name, stage in recipe.stage.items():
        lines.append(_stage_row(name, stage, [row for row in log if row["stage"] == name]))
    lines += [
        "",
        "`recipe.toml` is the whole recipe, `log.jsonl` and `loss.png` tell how it went.",
        "",
        '    python generate.py --model THIS_FOLDER --image FILE --prompt "..."',
        '    LLaVA.from_pretrained("THIS_FOLDER")        # model.py',
        "",
    ]
    return "\n".join(lines)


def _parts(model: Model) -> list[str]:
    if model.checkpoint:
        return [f"- all of {model.checkpoint}, trained on"]
    llm = model.llm or f"random weights, {model.llm_config.get('model_type')}"
    towers = [name for name in (model.vision, model.vision2) if name]
    return [
        f"- language model: {llm}",
        f"- vision encoder: {' + '.join(towers) or 'random weights'}",
        f"- connector: {model.connector}",
    ]


def _stage_row(name: str, stage: Stage, log: list[dict]) -> str:
    """Return the table row of a stage, with the last numbers of its log."""
    trains = []
    for part, how in vars(stage.tune).items():
        if how != "frozen":
            trains.append(f"{part} {how}")

    sources = [f"{source.data} x {source.weight}" for source in stage.mixture.values()]
    data = stage.data or ", ".join(sources)

    steps, loss, validation_loss = 0, "-", "-"
    for row in log:
        if row["event"] == "step":
            steps = row["step"]
            loss = f"{row['loss']:.4f}"
        elif row["event"] == "validation":
            validation_loss = f"{row['loss']:.4f}"
    return f"| {name} | {data} | {', '.join(trains)} | {steps} | {loss} | {validation_loss} |"
