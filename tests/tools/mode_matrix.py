"""Train in every way on one rank, on two and on four: the losses must be equal to 1e-5.

python -m tests.tools.mode_matrix RECIPE FOLDER

`make test-full` runs it. It has three parts: ways to tune times ways to spread a model over ranks,
ranks of which one sees text only, and a run that is stopped and goes on with other ranks.
"""

import collections
import json
import os
import signal
import sys
from pathlib import Path

import config
import data
from tests.tools.forked_runs import largest_difference, launch, losses, said
from training import run_log

STAGES = ("pretrain", "finetune")
# How the language model, the vision tower and the connector are tuned.
TUNE = (
    ("frozen", "frozen", "full"),
    ("full", "frozen", "full"),
    ("full", "full", "full"),
    ("partial:1", "frozen", "full"),
    ("full", "partial:1", "full"),
    ("frozen", "partial:1", "frozen"),
    ("partial:1", "full", "frozen"),
    ("lora", "frozen", "full"),
    ("qlora-nf4", "lora", "full"),
    ("qlora-int8", "qlora-nf4", "lora"),
)
SPREAD = (("none", 1), ("ddp", 2), ("fsdp", 2), ("fsdp", 4))


def in_both_stages(*settings: str) -> list[str]:
    return [f"stage.{stage}.{setting}" for stage in STAGES for setting in settings]


def tune_on_ranks(recipe: str, folder: Path):
    """Compare each way to tune on one rank with the same on several."""
    for llm, vision, connector in TUNE:
        tune = (f"tune.llm={llm}", f"tune.vision={vision}", f"tune.connector={connector}")
        # Masks of dropout would differ by rank.
        options = in_both_stages(*tune, "lora.r=4", "lora.dropout=0")
        name = "-".join((llm, vision, connector)).replace(":", "")

        want = []
        worst = {}
        for mode, ranks in SPREAD:
            out = folder / f"{name}-{mode}-{ranks}"
            arguments = [*options, f"train.parallel={mode}"]
            if ranks > 1:
                arguments += in_both_stages("micro_batch_tokens=60")
            assert launch(recipe, out, ranks, arguments) == [0] * ranks, said(out)

            if not want:
                want = losses(out)
                assert len(want) == 20
            difference = largest_difference(losses(out), want)
            worst[f"{mode} x{ranks}"] = difference
            assert difference < 1e-5, (name, worst)
        report = ", ".join(f"{spread} {difference:.1e}" for spread, difference in worst.items())
        print(f"{name:<28} {report}", flush=True)


def text_on_one_rank(recipe: str, folder: Path):
    """Train on two rows a step, one or both of them text: a rank may see no picture."""
    rows = json.loads(Path(config.load([recipe], recipe)[0].stage["finetune"].data).read_text())
    for i, row in enumerate(rows):
        if i % 3:
            row.pop("image", None)
            for turn in row["conversations"]:
                turn["value"] = turn["value"].replace("<image>", "")
    (folder / "mixed.json").write_text(json.dumps(rows))

    settings = (f"data={folder / 'mixed.json'}", "micro_batch_tokens=0", "global_batch=2")
    options = [f"stage.finetune.{setting}" for setting in settings]
    for ranks, mode in ((1, "none"), (2, "ddp"), (2, "fsdp")):
        out = folder / f"text-{mode}"
        assert launch(recipe, out, ranks, [*options, f"train.parallel={mode}"]) == [0] * ranks
        difference = largest_difference(losses(out), losses(folder / "text-none"))
        print(f"two rows a step, one or both of them text: {mode} {difference:.1e}", flush=True)
        assert difference < 1e-5


def record_and_stop(seen: Path, last_step: int | None):
    """Return what a rank does first: write each row's number down, and stop after a step."""

    def before(rank: int):
        move, log_step = data.Batch.to, run_log.RunLog.step

        def to(batch, device):
            with open(seen, "a") as f:
                f.write("".join(f"{row}\n" for row in batch.rows))
            return move(batch, device)

        def step(self, number, *args, **kwargs):
            log_step(self, number, *args, **kwargs)
            if self.name == "finetune" and number == last_step and rank == 0:
                os.kill(os.getpid(), signal.SIGTERM)

        data.Batch.to = to
        run_log.RunLog.step = step

    return before


def change_ranks(recipe: str, folder: Path):
    """Stop a run on two ranks, go on with one, stop, and end with four: same rows, same losses."""
    for mode in ("ddp", "fsdp"):
        arguments = ["stage.finetune.validation=", f"train.parallel={mode}"]

        one, one_rows = folder / f"one-{mode}", folder / f"one-{mode}.rows"
        assert launch(recipe, one, 1, arguments, record_and_stop(one_rows, None)) == [0]

        several, several_rows = folder / f"several-{mode}", folder / f"several-{mode}.rows"
        for ranks, last_step in ((2, 3), (1, 7), (4, None)):
            before = record_and_stop(several_rows, last_step)
            assert launch(recipe, several, ranks, arguments, before) == [0] * ranks

        counts = [collections.Counter(f.read_text().split()) for f in (one_rows, several_rows)]
        assert counts[0] == counts[1] and counts[0].total() == 240
        difference = largest_difference(losses(several), losses(one))
        print(f"2 -> 1 -> 4 ranks: {mode}: the same 240 rows, losses {difference:.1e}", flush=True)
        assert difference < 1e-5


def main(recipe: str, folder: str):
    tune_on_ranks(recipe, Path(folder))
    text_on_one_rank(recipe, Path(folder))
    change_ranks(recipe, Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
