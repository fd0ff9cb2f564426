"""What a grid has shown so far: read by results.py, planned by costs.py, shown by table.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from laboratory.grid import Cell
from laboratory.statistics import Answers


@dataclass(frozen=True)
class Cost:
    """What one training of a cell takes, by its recipe."""

    steps: dict[str, int]  # of each stage; 0 where the data that decide it are not there
    trained: int  # parameters that the last stage trains
    size: int  # parameters of the model, without blocks that never run
    tokens: int  # that a picture takes in the text
    step_flops: dict[str, float]  # of one optimizer step of each stage

    @property
    def all_steps(self) -> int | None:
        """The steps of all stages; None if one is not known."""
        if not all(self.steps.values()):
            return None
        return sum(self.steps.values())

    @property
    def flops(self) -> float | None:
        """The operations of all steps; None if their number is not known."""
        if self.all_steps is None:
            return None
        return sum(steps * self.step_flops[name] for name, steps in self.steps.items())


@dataclass(frozen=True)
class RunCost:
    """What the log of a run says that it took."""

    steps: int
    seconds: float | None  # of training; None if it was interrupted within a stage
    memory_gb: float | None  # None: the system does not say


@dataclass
class CellResult:
    """All that the finished runs of a cell have shown."""

    cell: Cell
    answers: dict[str, Answers]  # by the name of the score
    costs: list[RunCost]  # of each seed
    noise: dict[str, Answers] = field(default_factory=dict)  # with the noise seeds


@dataclass
class Results:
    """All that a grid has shown."""

    cells: list[CellResult]  # those that can be compared, the baseline first
    errors: dict[Cell, str]  # of the others
    notes: list[str]
