"""Where else the log goes: TensorBoard or Weights & Biases, both optional packages.

recorder = Recorder("tensorboard", output, recipe)
recorder.record(step, {"finetune/loss": 0.5})
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import config
from config import Recipe, UserError
from training.ranks import print0


class TensorBoard:
    def __init__(self, output: Path, recipe: Recipe):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(output / "tensorboard"))

    def record(self, step: int, numbers: dict[str, float]):
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()


class WeightsAndBiases:
    def __init__(self, output: Path, recipe: Recipe):
        import wandb

        self.run = wandb.init(
            project="barellava",
            name=output.name,
            dir=str(output),
            config={"recipe": config.dumps(recipe)},
        )

    def record(self, step: int, numbers: dict[str, float]):
        self.run.log(numbers, step=step)


BACKENDS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


class Recorder:
    """Sends numbers to the backend of train.log; kind "none" sends them nowhere.

    Raises UserError if the backend is not installed. Anything else that fails there (no network, no
    login) is said once, and training goes on without it: log.jsonl has everything.
    """

    def __init__(self, kind: str, output: Path, recipe: Recipe):
        self.kind = kind
        self.backend = None
        if kind != "none":
            with self._failing_once():
                self.backend = BACKENDS[kind](output, recipe)

    def record(self, step: int, numbers: dict[str, float]):
        if self.backend is None:
            return
        with self._failing_once():
            self.backend.record(step, numbers)

    @contextlib.contextmanager
    def _failing_once(self) -> Iterator[None]:
        try:
            yield
        except ImportError:
            what = f"{self.kind} is not installed"
            raise UserError("train.log", what, f"pip install {self.kind}") from None
        except Exception as e:
            print0(f"warning: train.log: {self.kind} failed ({e}); log.jsonl has everything")
            self.backend = None
