"""What lies beside a finished model to tell how it came about: README.md and loss.png.

    write_model_card(output, recipe)

Both are made from log.jsonl and the recipe. `draw_losses` makes the picture, `model_readme` the
README with the last numbers of each stage. run_log.py writes log.jsonl.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

from checkpoints.files import write_file
from config import Model, Recipe, Stage
from training.run_log import read_log

WIDTH, HEIGHT = 900, 420  # pixels of loss.png
EDGE = 50  # pixels around the plot
COLOURS = ("#3366cc", "#dc3912", "#109618", "#990099", "#ff9900")  # one per stage


def write_model_card(output: Path, recipe: Recipe):
    """Write loss.png and README.md into the folder of a finished model."""
    log = read_log(output / "log.jsonl")
    draw_losses(log, output / "loss.png")
    write_file(output / "README.md", model_readme(recipe, log))


# -------------------------------------------------------------------------------------- the picture


def draw_losses(log: list[dict], file: Path):
    """Draw the stages one after the other: the training loss as a line, validation as dots."""
    points = [row for row in log if row["event"] in ("step", "validation")]
    if not points:
        return
    highest = max(row["loss"] for row in points)
    highest = max(highest, 1e-9)  # the scale of a log of zeros

    # How many steps each stage has, in the order of the stages.
    steps_of: dict[str, int] = {}
    for row in points:
        name = row["stage"]
        steps_of[name] = max(row["step"], steps_of.get(name, 0))
    total = sum(steps_of.values())

    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)

    # The axes. In a picture y counts from the top.
    right = WIDTH - EDGE
    bottom = HEIGHT - EDGE
    draw.line([(EDGE, EDGE), (EDGE, bottom), (right, bottom)], "black")
    draw.text((4, EDGE - 6), f"{highest:.2f}", "black")
    draw.text((4, bottom - 6), "0.00", "black")
    draw.text((right - 30, bottom + 6), f"{total} steps", "black")

    def place(step: int, loss: float) -> tuple[float, float]:
        """Return the pixel of a loss after so many steps of the run."""
        x = EDGE + step / total * (right - EDGE)
        y = bottom - loss / highest * (bottom - EDGE)
        return x, y

    # A stage begins, on the x axis, where the one before ended.
    begin = 0
    for i, (name, steps) in enumerate(steps_of.items()):
        line = []
        dots = []
        for row in points:
            if row["stage"] != name:
                continue
            pixel = place(begin + row["step"], row["loss"])
            if row["event"] == "step":
                line.append(pixel)
            else:
                dots.append(pixel)

        colour = COLOURS[i % len(COLOURS)]
        draw.line(line, colour, 2)
        for x, y in dots:
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], colour)
        draw.text((EDGE + 10 + 160 * i, 14), f"{name} (dots: validation)", colour)
        begin += steps
    write_file(file, lambda path: image.save(path, "PNG"))


# ----------------------------------------------------------------------------------------- the card


def model_readme(recipe: Recipe, log: list[dict]) -> str:
    """Return README.md: what the model is made of, what it saw, how it scored, how to open it."""
    title = Path(recipe.train.output).name
    lines = [
        f"# {title}",
        "",
        *_parts(recipe.model),
        "",
        "| stage | data | trains | steps | loss | validation loss |",
        "|---|---|---|---|---|---|",
    ]
    for name, stage in recipe.stage.items():
        log_of_stage = [row for row in log if row["stage"] == name]
        lines.append(_stage_row(name, stage, log_of_stage))
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
    """Return the lines that say where the weights were from when training began."""
    if model.checkpoint:
        return [f"- all of {model.checkpoint}, trained on"]

    llm = model.llm
    if not llm:
        llm = f"random weights, {model.llm_config.get('model_type')}"

    # A mixture of features has two encoders.
    encoders = [name for name in (model.vision, model.vision2) if name]
    vision = " + ".join(encoders) or "random weights"
    return [
        f"- language model: {llm}",
        f"- vision encoder: {vision}",
        f"- connector: {model.connector}",
    ]


def _stage_row(name: str, stage: Stage, log: list[dict]) -> str:
    """Return the table row of a stage, with the last numbers of its log."""
    trains = []
    for part, how in vars(stage.tune).items():
        if how != "frozen":
            trains.append(f"{part} {how}")

    # A stage has one file of data, or a mixture of several with their weights.
    sources = [f"{source.data} x {source.weight}" for source in stage.mixture.values()]
    data = stage.data or ", ".join(sources)

    # The log is in the order of time, so what is left are the last numbers.
    steps = 0
    loss = "-"
    validation_loss = "-"
    for row in log:
        if row["event"] == "step":
            steps = row["step"]
            loss = f"{row['loss']:.4f}"
        elif row["event"] == "validation":
            validation_loss = f"{row['loss']:.4f}"
    return f"| {name} | {data} | {', '.join(trains)} | {steps} | {loss} | {validation_loss} |"
