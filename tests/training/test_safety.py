"""A run that cannot be lost: killed, told to stop, out of disk, damaged, sharded, full of NaN."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import config
from checkpoints import resume
from config import UserError
from packing import EMPTY
from tests.tools.environment import ROOT, run
from tests.tools.training_runs import (  # recipe and tiny_world are fixtures
    background,
    distributed,
    losses,
    one_line,
    recipe,  # noqa: F401
    scripted,
    tiny_world,  # noqa: F401
    wait_for_steps,
)
from training import parallel, state
from training.ranks import Ranks
from training.recorder import Recorder

FULL = pytest.mark.full
SHORT = ("stage.pretrain.steps=2", "stage.finetune.steps=4", "train.save_every=2")


# -------------------------------------------------------------------------------------- a whole run


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=FULL)])
def test_told_to_stop_it_saves_and_goes_on_as_if_nothing_had_been(recipe, ranks):  # noqa: F811
    many = ("stage.finetune.steps=30", "train.save_every=1000")
    file, out = recipe("stopped")
    process = background(file, *many, ranks=ranks)
    wait_for_steps(process, out, 9)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate()
    assert "stops: SIGTERM" in said and "preempted: saved in" in said
    if ranks == 1:  # torchrun has its own opinion of a signal
        assert process.returncode == 0 and errors == ""
    assert (out / "PREEMPTED").exists() and not (out / "config.json").exists()
    done = len(losses(out))
    assert 9 <= done < 36
    again = run("train.py", file, *many)
    assert f"resumed: 1 of 2 stages done, {done - 6} steps of the next" in again.stdout
    assert len(losses(out)) == 36 and not (out / "PREEMPTED").exists()
    file, whole = recipe("whole")
    run("train.py", file, *many)
    if ranks == 1:
        assert (out / "model.safetensors").read_bytes() == (
            whole / "model.safetensors"
        ).read_bytes()
    assert losses(out) == pytest.approx(losses(whole), rel=1e-5)


def test_two_runs_in_one_folder(recipe):  # noqa: F811
    file, out = recipe("twice")
    process = background(file, "stage.finetune.steps=300")
    wait_for_steps(process, out, 1)
    line = one_line(run("train.py", file, "stage.finetune.steps=300", ok=False))
    assert f"another run is training here (process {process.pid})" in line
    process.kill()
    process.communicate()
    assert not resume.lock(out).closed


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
def test_nan_stops_every_rank_before_the_update_and_names_the_rows(recipe, tmp_path, ranks):  # noqa: F811
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
    assert len(errors) == 1, done.stderr
    named = [r for r in (17, 80) if f"row {r} (id pretrain-000{r})" in errors[0]]
    assert named and errors[0].count("row ") == len(named)
    assert "loss nan" in errors[0] and "nothing was updated; fix: " in errors[0]
    if ranks == 1:
        one_line(done)
    newest = resume.listed(out / "checkpoints")[-1]
    step = resume.verify(newest)["step"]
    assert step == len(losses(out))
    assert all(t.isfinite().all() for t in resume.read(newest)[0].values())


def test_the_first_rank_to_fail_has_the_last_word(recipe, tmp_path):  # noqa: F811
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
    assert all("Traceback" in line for line in ours[1:]) and len(ours) <= 2  # torchrun's own
    assert "traceback : error: " in done.stderr  # its summary quotes the line


def test_a_disk_too_small_for_the_run_is_one_line_at_the_start(recipe):  # noqa: F811
    file, out = recipe("small")
    patch = (
        "import shutil; shutil.disk_usage = lambda path: shutil._ntuple_diskusage(9, 9, 500_000)"
    )
    assert "3 checkpoints and the model" in one_line(scripted(patch, file))
    assert not (out / "log.jsonl").exists()


@contextlib.contextmanager
def mounted(folder: Path, options: str):
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True
    ).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        yield
    finally:
        subprocess.run(["umount", folder])


def test_a_disk_that_fills_up(recipe):  # noqa: F811
    file, out = recipe("full")
    with mounted(out, "size=6m"):
        process = background(file, "stage.finetune.steps=4000")
        wait_for_steps(process, out, 12)
        with contextlib.suppress(OSError), open(out / "filler", "wb", buffering=0) as f:
            while f.write(bytes(4096)):
                pass
        _, errors = process.communicate()
        assert process.returncode == 1 and len(errors.strip().splitlines()) == 1, errors
        assert errors.startswith("error: ") and "; fix: make room" in errors
        assert resume.verify(resume.listed(out / "checkpoints")[-1])
        (out / "filler").unlink()
        process = background(file, "stage.finetune.steps=4000")
        assert "resumed: 1 of 2 stages done" in process.stdout.readline()
        process.kill()
        process.communicate()


def test_a_folder_that_cannot_be_written_is_one_line(recipe):  # noqa: F811
    file, out = recipe("readonly")
    with mounted(out, "ro"):
        assert "cannot be written: Read-only file system" in one_line(
            run("train.py", file, ok=False)
        )


def test_the_best_model_is_kept(recipe):  # noqa: F811
    file, out = recipe("best")
    climbing = (
        "stage.finetune.validation_every=1",
        "stage.finetune.learning_rate=3.0",
        "train.keep_best=true",
    )
    kept = """
import shutil
def rmtree(path, real=shutil.rmtree, **how):
    if not str(path).endswith("checkpoints"):
        real(path, **how)
shutil.rmtree = rmtree"""
    scripted(kept, file, *SHORT, *climbing, "train.keep=1", ok=True)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    loss, step = min((r["loss"], r["step"]) for r in rows if r["event"] == "validation")
    assert step < 4, "the newest one holds the best: choose a rate at which it diverges"
    tensors, state = resume.read(out / "checkpoints" / f"01-{step:08d}")
    assert state["validation"] == loss
    model = load_file(out / "best/model.safetensors")
    trained = {k.removeprefix("weight."): t for k, t in tensors.items() if k.startswith("weight.")}
    assert trained and all(torch.equal(model[k], t) for k, t in trained.items())
    assert (out / "best/config.json").exists() and (out / "best/tokenizer.json").exists()


def test_keep_best_without_validation_is_one_line(recipe):  # noqa: F811
    file, _ = recipe("blind")
    assert "keep_best" in one_line(
        run("train.py", file, "train.keep_best=true", "stage.finetune.validation=", ok=False)
    )


def test_an_explicit_checkpoint_of_a_run(recipe):  # noqa: F811
    file, out = recipe("explicit")
    same = ("stage.finetune.steps=300", "train.keep=9")
    process = background(file, *same)
    wait_for_steps(process, out, 20)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    first = resume.listed(out / "checkpoints")[0]
    (first / resume.TENSORS).write_bytes(b"short")
    line = one_line(run("train.py", file, *same, f"train.resume={first}", ok=False))
    assert "train.resume=" in line and "has 5 bytes" in line


# ------------------------------------------------------------------------------------- sharded runs


def test_ddp_and_sharded_ranks_change_nothing(recipe):  # noqa: F811
    """Micro-batches with and without pictures, their number differs by rank, 20 losses each."""
    file, out = recipe("alone")
    run("train.py", file)
    want, model = losses(out), load_file(out / "model.safetensors")
    for mode in ("ddp", "fsdp"):
        file, out = recipe(mode)
        said = distributed(
            2, file, f"train.parallel={mode}", "stage.finetune.micro_batch_tokens=60"
        ).stdout
        assert f"; {mode} on 2 ranks" in said
        assert len(want) == 20 and losses(out) == pytest.approx(want, rel=1e-5), mode
        got = load_file(out / "model.safetensors")
        assert got.keys() == model.keys()
        assert all(torch.allclose(got[k], model[k], rtol=1e-3, atol=1e-5) for k in model)


def test_ranks_with_tiles_videos_and_text_change_nothing(recipe, tiny_world, tmp_path):  # noqa: F811
    """A rank has tiles where another has a clip, or text alone: none waits, and losses are equal."""
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
        distributed(2, file, *change, f"train.parallel={mode}")
        assert len(want) == 6 and losses(out) == pytest.approx(want, rel=1e-5), mode


def test_a_batch_of_nothing_has_no_loss_and_no_gradient(recipe):  # noqa: F811
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


# ----------------------------------------------------------------------------------------- watching


def test_a_finished_folder_tells_how_it_went(recipe):  # noqa: F811
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


def test_a_recorder_that_fails_is_said_once_and_a_missing_one_is_an_error(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        UserError, match="train.log: wandb is not installed; fix: pip install wandb"
    ):
        Recorder("wandb", tmp_path, config.Recipe())
    sent = []

    class Wandb:
        def init(self, **_):
            return self

        def log(self, row, step):
            sent.append((step, row))
            if step == 2:
                raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "wandb", Wandb())
    recorder = Recorder("wandb", tmp_path, config.Recipe())
    for step in (1, 2, 3):
        recorder.record(step, {"loss": 1.0})
    assert [step for step, _ in sent] == [1, 2]
    assert capsys.readouterr().out.count("no network") == 1
    assert Recorder("none", tmp_path, config.Recipe()).record(1, {}) is None


# ---------------------------------------------------------------- the long matrices: make test-full

# Runs of train.main in forked children: a second each, not ten. `launch` starts one per rank and returns their exit
# codes; `before` is called in each child, to break something or to watch.
HARNESS = """
import collections, hashlib, json, os, signal, sys
sys.path.insert(0, ".")
import torch
torch.set_num_threads(1)
import data, train
from checkpoints import resume
from training import output, run_log, state
from training.ranks import last_word
from pathlib import Path
from safetensors.torch import load_file
RECIPE, FOLDER, PORT = sys.argv[1], Path(sys.argv[2]), 20000 + os.getpid() % 20000

def launch(out, size=1, arguments=(), before=lambda rank: None):
    global PORT
    PORT += 1
    children = []
    for rank in range(size):
        if pid := os.fork():
            children.append(pid)
            continue
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(PORT))
        log = os.open(f"{out}.{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        before(rank)
        with last_word():
            train.main([RECIPE, f"train.output={out}", "train.workers=0", *arguments])
        os._exit(0)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]

def losses(out):
    rows = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["event"] == "step"]

def far(a, b):
    assert len(a) == len(b), (len(a), len(b))
    return max(abs(x - y) / y for x, y in zip(a, b))
"""

KILLS = (
    HARNESS
    + """
PHASES = {  # what is about to be called when the process dies, and how often it is called in a whole run
    "start": (output, "claim", 1), "load": (state, "build", 3), "first batch": (data.Steps, "__getitem__", 1),
    "forward": (train.LLaVA, "loss", 22), "backward": (torch.Tensor, "backward", 22),
    "optimizer": (torch.optim.AdamW, "step", 22), "validation": (train, "validate", 3),
    "writing tensors": (resume, "save_file", 9), "export": (train.LLaVA, "save", 1),
    "before the manifest": ("text", 9), "before the rename": ("os.rename", 9), "pruning": ("prune", 9),
    "sealing alone": ("digest", 9),
}
# In the process that seals: the training is killed, and with it this process, but for the last phase, where it goes on.
SEAL = '''
import os, signal, sys
sys.path.insert(0, os.getcwd())
from checkpoints import seal
def die(*args, real=seal.NAME, **kwargs):
    with open("COUNT", "a") as f:
        f.write(".")
        f.flush()
        if f.tell() == WHICH:
            os.kill(os.getppid(), signal.SIGKILL)
            if "NAME" != "digest":
                os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
seal.NAME = die
seal.main(*sys.argv[1:])
'''
short = ["train.save_every=2", "stage.finetune.validation_every=5"]
assert launch(FOLDER / "whole", 1, short) == [0]
want = (FOLDER / "whole/model.safetensors").read_bytes()
for phase, (*owner, name, calls) in PHASES.items():
    lost = []
    for i in range(5):
        out, left = FOLDER / f"{phase} {i}", [1 + i * calls // 5]

        def die_sealing(rank):
            file = Path(f"{out}.py")
            file.write_text(SEAL.replace("NAME", name).replace("COUNT", f"{out}.count").replace("WHICH", str(left[0])))
            resume.seal.__file__ = str(file)

        def die(rank, real=owner and getattr(*owner, name)):
            def counted(*args, **kwargs):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)
            setattr(*owner, name, counted)

        assert launch(out, 1, short, die if owner else die_sealing) == [-9], phase
        done = len(losses(out)) if (out / "log.jsonl").exists() else 0
        assert launch(out, 1, short) == [0], open(f"{out}.0.txt").read()
        said = open(f"{out}.0.txt").read().split("resumed: ")[1:]
        begun = (0, 6, 20)[int(said[0].split()[0])] + int(said[0].split(", ")[1].split()[0]) if said else 0
        lost.append(done - begun)
        assert 0 <= done - begun <= 4, (phase, done, begun)  # two saves: one may have been in flight
        assert len(losses(out)) == 20
        assert (out / "model.safetensors").read_bytes() == want, phase
    print(f"{phase:<20} 5 kills, steps lost {lost}: the next start ended with the same bits", flush=True)
"""
)

MODES = (
    HARNESS
    + """
TUNE = [dict(llm=l, vision=v, connector=c) for l, v, c in (
    ("frozen", "frozen", "full"), ("full", "frozen", "full"), ("full", "full", "full"), ("partial:1", "frozen", "full"),
    ("full", "partial:1", "full"), ("frozen", "partial:1", "frozen"), ("partial:1", "full", "frozen"),
    ("lora", "frozen", "full"), ("qlora-nf4", "lora", "full"), ("qlora-int8", "qlora-nf4", "lora"))]
LORA = [f"stage.{s}.lora.{k}" for s in ("pretrain", "finetune") for k in ("r=4", "dropout=0")]  # masks differ by rank
for tune in TUNE:
    both = [f"stage.{s}.tune.{part}={how}" for s in ("pretrain", "finetune") for part, how in tune.items()]
    name, want, worst = "-".join(tune.values()).replace(":", ""), None, {}
    for mode, ranks in (("none", 1), ("ddp", 2), ("fsdp", 2), ("fsdp", 4)):
        out = FOLDER / f"{name}-{mode}-{ranks}"
        budget = [f"stage.{s}.micro_batch_tokens=60" for s in ("pretrain", "finetune")] * (ranks > 1)
        done = launch(out, ranks, [*both, *budget, *LORA, f"train.parallel={mode}"])
        assert done == [0] * ranks, open(f"{out}.0.txt").read()
        want = want or losses(out)
        worst[f"{mode} x{ranks}"] = far(losses(out), want)
        assert len(want) == 20 and worst[f"{mode} x{ranks}"] < 1e-5, (name, worst)
    print(f"{name:<28}", ", ".join(f"{k} {v:.1e}" for k, v in worst.items()), flush=True)

# one rank sees text only
rows = json.loads(Path(train.config.load([RECIPE], RECIPE)[0].stage["finetune"].data).read_text())
for i, row in enumerate(rows):
    if i % 3:
        row.pop("image", None)
        for turn in row["conversations"]:
            turn["value"] = turn["value"].replace("<image>", "")
(FOLDER / "mixed.json").write_text(json.dumps(rows))
one = [f"stage.finetune.{k}" for k in (f"data={FOLDER / 'mixed.json'}", "micro_batch_tokens=0", "global_batch=2")]
for ranks, mode in ((1, "none"), (2, "ddp"), (2, "fsdp")):
    assert launch(FOLDER / f"text-{mode}", ranks, [*one, f"train.parallel={mode}"]) == [0] * ranks
    off = far(losses(FOLDER / f"text-{mode}"), losses(FOLDER / "text-none"))
    print(f"two rows a step, one or both of them text: {mode} {off:.1e}", flush=True)
    assert off < 1e-5

# 2 -> 1 -> 4 ranks
def stop_at(step, seen):
    def before(rank):
        def to(batch, device, real=data.Batch.to):
            with open(seen, "a") as f:
                f.write("".join(f"{r}\\n" for r in batch.rows))
            return real(batch, device)
        def write(self, *a, real=run_log.RunLog.step, **k):
            real(self, *a, **k)
            if self.name == "finetune" and a[0] == step and rank == 0:
                os.kill(os.getpid(), signal.SIGTERM)
        data.Batch.to, run_log.RunLog.step = to, write
    return before

quiet = ["stage.finetune.validation="]
for ranks in ((1,), (2, 1, 4)):
    for mode in ("ddp", "fsdp"):
        out = FOLDER / f"{len(ranks)}-{mode}"
        for i, n in enumerate(ranks):
            arguments = [*quiet, f"train.parallel={mode}"]
            assert launch(out, n, arguments, stop_at((3, 7, 99)[i] if len(ranks) > 1 else 99, f"{out}.rows")) == [0] * n
for mode in ("ddp", "fsdp"):
    rows = [collections.Counter(open(FOLDER / f"{n}-{mode}.rows").read().split()) for n in (1, 3)]
    assert rows[0] == rows[1] and rows[0].total() == 240
    off = far(losses(FOLDER / f"3-{mode}"), losses(FOLDER / f"1-{mode}"))
    print(f"2 -> 1 -> 4 ranks: {mode}: the same 240 rows, losses {off:.1e}", flush=True)
    assert off < 1e-5
"""
)


@FULL
@pytest.mark.parametrize("script", [KILLS, MODES], ids=["kill", "modes"])
def test_matrix(recipe, tmp_path, script):  # noqa: F811
    file, _ = recipe("matrix")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
    }  # its lines are the report: shown as they come, with -s
    assert not subprocess.run(
        [sys.executable, "-c", script, file, tmp_path], cwd=ROOT, env=environment
    ).returncode


@FULL
def test_two_nodes_train_one_model(recipe):  # noqa: F811
    file, out = recipe("nodes")
    where = [
        "--nnodes=2",
        "--nproc-per-node=1",
        "--master-addr=127.0.0.1",
        f"--master-port={20000 + os.getpid() % 9999}",
    ]
    node = [sys.executable, "-m", "torch.distributed.run", *where]
    started = [
        subprocess.Popen([*node, f"--node-rank={i}", "train.py", str(file)], cwd=ROOT)
        for i in range(2)
    ]
    assert [process.wait() for process in started] == [0, 0]
    file, alone = recipe("alone")
    run("train.py", file)
    assert losses(out) == pytest.approx(losses(alone), rel=1e-5)
