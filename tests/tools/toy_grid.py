"""A grid whose trainings take no time: train.py and evaluate.py are played by functions here.

`write_grid` writes a grid and its recipe. `Scripts(...).launch` stands for laboratory.cells.launch:
it writes what the scripts write, with answers that are right as often as the rate of stage 2 says.
So a test breaks, kills or changes what it likes, and the rest of the laboratory is the real one.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import config
from evals.scores import Result, group_scores

PICTURES = 40
QUESTIONS = 3  # of each picture

RECIPE = """
[model]
tokenizer = "./nowhere/tokenizer"
feature_layer = -1
[model.llm_config]
model_type = "llama"
vocab_size = 64
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 1
num_attention_heads = 2
[model.vision_config]
model_type = "siglip_vision_model"
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 1
num_attention_heads = 2
patch_size = 16
image_size = 32
[train]
output = "out/toy"
[stage.finetune]
data = "./nowhere/rows.json"
template = "plain"
tune = { llm = "full" }
steps = 8
global_batch = 4
learning_rate = 0.8
"""

GRID = """
base = "{folder}/base.toml"
output = "{folder}/out"
seeds = [0, 1, 2]
noise_seeds = [3, 4, 5]
baseline = {{ rate = "right" }}
overrides = ["train.precision=fp32"]

[axis.rate]
"right" = []
"the same" = ["stage.finetune.learning_rate=0.8"]
"worse" = ["stage.finetune.learning_rate=0.2"]

[[measure]]
task = "toy"
data = "nowhere"

[[plot]]
x = "rate"
y = "all"

[[plot]]
x = "flops"
y = "half"
by = "rate"
"""


def write_grid(folder: Path, **changes: str) -> Path:
    """Write a recipe and a grid to a folder; changes: old text by new text, {old: new}."""
    (folder / "base.toml").write_text(RECIPE)
    text = GRID.format(folder=folder)
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "grid.toml").write_text(text)
    return folder / "grid.toml"


def examples(data_dir) -> list[dict]:
    """Return the questions of the task "toy"."""
    found = []
    for i in range(PICTURES * QUESTIONS):
        image = f"{i // QUESTIONS}.png"
        found.append({"id": f"q{i}", "image": image, "prompt": f"{i}?", "label": "yes"})
    return found


def score(examples: list[dict], answers: list[str]) -> dict[str, dict]:
    """Return "all", "half" (of the questions) and "cubed", which is no mean."""
    results = []
    for example, answer in zip(examples, answers, strict=True):
        groups = ["all"]
        if int(example["id"][1:]) % 2:
            groups.append("half")
        results.append(Result(groups, answer == example["label"], 0.5))
    scores = group_scores(results)
    scores["cubed"] = {**scores["all"], "score": scores["all"]["score"] ** 3 / 1e4}
    return scores


TASK = SimpleNamespace(MAX_NEW_TOKENS=1, examples=examples, score=score)


class Done:
    """A process that has ended, with what is used of subprocess.Popen."""

    def __init__(self, code: int):
        self.code = code

    def wait(self) -> int:
        return self.code

    def terminate(self):
        """Do nothing: it has ended."""


class Scripts:
    """train.py and evaluate.py."""

    def __init__(self, before: Callable[[list[str]], None] | None = None):
        """before: called with each command line; what it raises ends the laboratory."""
        self.before = before
        self.started: list[list[str]] = []
        self.facts = {"steps": 8, "rows": 100, "data": "a", "shown": "b", "code": "c"}

    def launch(self, command: list[str], said: BinaryIO, variables: dict[str, str]) -> Done:
        """Do what the script would do."""
        self.started.append(command)
        if self.before is not None:
            self.before(command)
        if command[0] == "train.py":
            return self.train(command[1:], said)
        return self.evaluate(command)

    def train(self, arguments: list[str], said: BinaryIO) -> Done:
        recipe, _ = config.load(arguments, arguments[0])
        if recipe.stage["finetune"].tune.llm == "nonsense":
            said.write(b"step 1\nerror: tune.llm: 'nonsense' | no way; fix: write full\n")
            return Done(1)
        folder = Path(recipe.train.output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.toml").write_text(config.dumps(recipe))
        contents = {"code": self.facts["code"], "stage.finetune rows": self.facts["data"]}
        (folder / "made_from.json").write_text(json.dumps(contents))
        events = [
            {"event": "start", "step": 0, "steps": self.facts["steps"], "rows": self.facts["rows"]},
            {"event": "step", "step": 8, "loss": 1.0, "memory_gb": 0.5},
            {"event": "end", "seconds": 12.5},
        ]
        lines = [json.dumps({"stage": "finetune", **event}) + "\n" for event in events]
        (folder / "log.jsonl").write_text("".join(lines))
        (folder / "config.json").write_text("{}")
        return Done(0)

    def evaluate(self, command: list[str]) -> Done:
        folder = Path(command[command.index("--model") + 1])
        is_blank = "--blank" in command
        recipe, _ = config.load([str(folder / "recipe.toml")], folder)
        right = recipe.stage["finetune"].learning_rate
        rng = random.Random(f"{recipe.train.seed} {right} {is_blank}")
        if is_blank:
            right = 0.5

        answers = ["yes" if rng.random() < right else "no" for _ in examples("")]
        name = "toy-blank" if is_blank else "toy"
        place = folder / "eval"
        place.mkdir(exist_ok=True)
        rows = []
        for example, answer in zip(examples(""), answers, strict=True):
            row = {"id": example["id"], "question": example["prompt"], "answer": answer}
            row |= {"label": example["label"], "image": example["image"]}
            rows.append(json.dumps(row) + "\n")
        (place / f"{name}.jsonl").write_text("".join(rows))
        made = {"shown": self.facts["shown"], "options": {}, "model": str(folder)}
        (place / f"{name}-origin.json").write_text(json.dumps(made))
        found = {"scores": score(examples(""), answers)}
        (place / f"{name}.json").write_text(json.dumps(found))
        return Done(0)
