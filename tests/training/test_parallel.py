"""Several ranks, with and without sharding, compute what one rank does."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import config
from config import UserError
from packing import EMPTY
from tests.tools.environment import run
from tests.tools.training_runs import losses, on_ranks
from training import parallel, state
from training.ranks import Ranks


def test_ddp_and_sharded_ranks_change_nothing(recipe, whole_run):
    """Micro-batches with and without pictures, their number differs by rank, 20 losses each."""
    want, model = losses(whole_run), load_file(whole_run / "model.safetensors")
    for mode in ("ddp", "fsdp"):
        file, out = recipe(mode)
        said = on_ranks(
            2, file, f"train.parallel={mode}", "stage.finetune.micro_batch_tokens=60"
        ).stdout
        assert f"; {mode} on 2 ranks" in said
        assert len(want) == 20 and losses(out) == pytest.approx(want, rel=1e-5), mode
        got = load_file(out / "model.safetensors")
        assert got.keys() == model.keys()
        assert all(torch.allclose(got[k], model[k], rtol=1e-3, atol=1e-5) for k in model)


def test_ranks_with_tiles_videos_and_text_change_nothing(recipe, tiny_world, tmp_path):
    """A rank has tiles where another has a clip or text alone: none waits, losses are equal."""
    rows = json.loads((tiny_world / "finetune.json").read_text())[:60]
    for row in rows[::3]:
        if name := row.pop("image", None):
            frames = [Image.open(tiny_world / "images" / name).rotate(90 * i) for i in range(3)]
            row["video"] = f"{row['id']}.gif"
            frames[0].save(
                tmp_path / row["video"], save_all=True, append_images=frames[1:], duration=100
            )
    for row in rows:
        if "image" in row:
            row["image"] = str(tiny_world / "images" / row["image"])
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    change = [
        f"stage.finetune.data={tmp_path}/rows.json",
        f"stage.finetune.images={tmp_path}",
        "stage.finetune.validation=",
        "stage.finetune.micro_batch_tokens=60",
        "stage.finetune.steps=4",
        "stage.pretrain.steps=2",
        "model.connector=mlp2x_gelu",
        "model.image_mode=anyres",
        "model.frames=3",
    ]
    file, out = recipe("alone")
    run("train.py", file, *change)
    want = losses(out)
    for mode in ("ddp", "fsdp"):
        file, out = recipe(mode)
        on_ranks(2, file, *change, f"train.parallel={mode}")
        assert len(want) == 6 and losses(out) == pytest.approx(want, rel=1e-5), mode


def test_a_batch_of_nothing_has_no_loss_and_no_gradient(recipe):
    loaded, _ = config.load([str(recipe("nothing")[0])], "")
    model = state.build(loaded, {}, loaded.stage["finetune"])
    loss = model.loss(EMPTY.to("cpu"))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_none_is_refused_on_several_ranks():
    model = torch.nn.Linear(2, 2)
    two = Ranks(0, 2, torch.device("cpu"))
    with pytest.raises(UserError, match="train.parallel: none, but 2 ranks"):
        parallel.choose_mode("none", model, two)
    assert parallel.choose_mode("auto", model, two) == "ddp"
    alone = Ranks(0, 1, torch.device("cpu"))
    assert parallel.choose_mode("fsdp", model, alone) == "none"
