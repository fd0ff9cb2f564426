"""Where else the log goes: TensorBoard or Weights & Biases, both optional packages.

    recorder = Recorder("tensorboard", output, recipe)
    recorder.record(step, {"finetune/loss": 0.5})

`Recorder` is what training uses. A backend is a class with the same `record`; a new one is an entry
of BACKENDS.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import config
from config import Recipe, UserError, printable
from training.ranks import print0


class TensorBoard:
    """TensorBoard's event files, in the folder tensorboard/STAGE of the output.

    A run that was resumed makes some steps again. TensorBoard hides the first copies of all steps
    from `purge_step` on. It does so for a whole folder, so each stage has one of its own.
    """

    def __init__(self, output: Path, recipe: Recipe, stage: str, start: int):
        from torch.utils.tensorboard import SummaryWriter

        folder = output / "tensorboard" / stage
        self.writer = SummaryWriter(str(folder), purge_step=start + 1)

    def record(self, step: int, numbers: dict[str, float]):
        """Write the numbers of a step, to be seen at once."""
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()


class WeightsAndBiases:
    """A run of Weights & Biases with the name of the output folder."""

    def __init__(self, output: Path, recipe: Recipe, stage: str, start: int):
        import wandb

        self.run = wandb.init(
            project="barellava",
            name=output.name,
            dir=str(output),
            config={"recipe": config.dumps(recipe)},
        )

    def record(self, step: int, numbers: dict[str, float]):
        """Send the numbers of a step."""
        self.run.log(numbers, step=step)


BACKENDS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


class Recorder:
    """Sends numbers to the backend of train.log; kind "none" sends them nowhere.

    stage, start: the stage, and how many of its steps are done. Raises UserError if the backend is
    not installed. If anything else fails there (no network, no
    login), one warning says so and training goes on without it: log.jsonl has everything.
    """

    def __init__(self, kind: str, output: Path, recipe: Recipe, stage: str = "", start: int = 0):
        self.kind = kind
        self.backend = None
        if kind != "none":
            with self._failing_once():
                self.backend = BACKENDS[kind](output, recipe, stage, start)

    def record(self, step: int, numbers: dict[str, float]):
        """Send the numbers of a step to the backend, if there is one that works."""
        if self.backend is None:
            return
        with self._failing_once():
            self.backend.record(step, numbers)

    @contextlib.contextmanager
    def _failing_once(self) -> Iterator[None]:
        """Give the backend up when it fails in this context, and warn."""
        try:
            yield
        except ImportError:
            what = f"{self.kind} is not installed"
            raise UserError("train.log", what, f"pip install {self.kind}") from None
        except Exception as e:
            print0(
                f"warning: train.log: {self.kind} failed ({printable(e)}); log.jsonl has everything"
            )
            self.backend = None
