"""How ranks end: one error for all of them, said by the one that failed first."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import config
import train
from checkpoints import resume, seal
from tests.tools.environment import ROOT, run
from tests.tools.training_runs import distributed, losses, one_line
from training.ranks import Ranks

FULL = pytest.mark.full

NAN = """
import data, torch
def pack(samples, real=data.pack_samples):
    batch = real(samples)
    for s, row in enumerate(batch.rows):
        if row in {rows}:
            cu = batch.cu_seqlens
            batch.positions = batch.positions.double()
            batch.positions[cu[s]:cu[s + 1]] = float("nan")
    return batch
data.pack_samples = pack
"""


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=FULL)])
def test_nan_stops_every_rank_before_the_update_and_names_the_rows(recipe, tmp_path, ranks):
    file, out = recipe("nan")
    script = tmp_path / "nan.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        + NAN.format(rows={17, 80})
        + f"import runpy; runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
    )
    start = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
        if ranks > 1
        else []
    )
    one = (
        "stage.pretrain.micro_batch_tokens=0",
        "train.save_every=1",
        "train.workers=0",
        "stage.pretrain.steps=30",
    )
    done = run(*start, script, file, *one, ok=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    if ranks > 1:
        assert errors.pop() == errors[0]  # said again after torchrun's own lines
    assert len(errors) == 1, done.stderr
    named = [r for r in (17, 80) if f"row {r} (id pretrain-000{r})" in errors[0]]
    assert named and errors[0].count("row ") == len(named)
    assert "loss nan" in errors[0] and "nothing was updated; fix: " in errors[0]
    if ranks == 1:
        one_line(done)
    with seal.alone(out / "checkpoints"):  # the seal of the last one ends by itself
        newest = seal.listed(out / "checkpoints")[-1]
    step = resume.verify(newest)["step"]
    assert step == len(losses(out))
    assert all(t.isfinite().all() for t in resume.read(newest)[0].values())


def test_a_row_of_several_samples_is_named_once():
    ranks = Ranks(0, 1, torch.device("cpu"))
    steps = SimpleNamespace(rows=SimpleNamespace(where=lambda row: f"row {row}"))
    stage = SimpleNamespace(ranks=ranks, steps=steps, name="finetune")
    batches = [SimpleNamespace(rows=[7, 3, 3]), SimpleNamespace(rows=[3, 5])]
    nan, one = torch.tensor(math.nan), torch.tensor(1.0)
    for losses_of, named in {(nan, one): "row 3, row 7", (one, one): "row 3, row 5, row 7"}.items():
        with pytest.raises(config.UserError) as error:
            train.refuse(stage, batches, list(losses_of), "loss nan", 4)
        assert str(error.value).startswith(f"{named}: loss nan at finetune step 5")


def test_the_first_rank_to_fail_has_the_last_word(recipe, tmp_path):
    file, out = recipe("rank")
    rows = json.loads(Path(config.load([str(file)], file)[0].stage["pretrain"].data).read_text())
    rows[40]["image"] = "nowhere.png"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    done = distributed(
        2,
        file,
        f"stage.pretrain.data={tmp_path / 'rows.json'}",
        "stage.pretrain.steps=12",
        ok=False,
    )
    ours = [
        line
        for line in done.stderr.splitlines()
        if line.startswith("error: ") or "Traceback" in line
    ]
    assert ours[0].startswith("error: ") and "nowhere.png" in ours[0]
    assert ours[-1] == ours[0] == done.stderr.splitlines()[-1]  # said again after torchrun's lines
    assert all("Traceback" in line for line in ours[1:-1]) and len(ours) <= 3  # torchrun's own
    assert "traceback : error: " in done.stderr  # its summary quotes the line
