"""The training loop: equal to the reference's, to itself however split, and to itself killed."""

import dataclasses
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import config
import lora
import train
from checkpoints import seal
from config import Stage, Tune
from data import stage_spec, validation_batches
from inputs.pictures import load_image
from inputs.rows import open_rows
from inputs.templates import encode_prompt, stop_id
from inputs.tokenizer import load_tokenizer
from model import LLaVA
from tests.tools.environment import DEVICES, GPU, ROOT, run, shared
from tests.tools.training_runs import (
    background,
    losses,
    losses_so_far,
    on_ranks,
    torchrun,
    wait_for_steps,
)
from training import state
from training.parallel import ParallelModel
from training.ranks import Ranks

# ---------------------------------------------------------------------------- against the reference


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("trained", ["c", "cl", "clv"])
def test_trajectory_of_the_reference(trained, device):
    """20 steps through make_optimizer, schedule and update: losses, norms and rates, to 1e-4."""
    golden = json.loads(shared("golden/trajectories.json").read_text())
    assert {trajectory["tune"] for trajectory in golden} == {"c", "cl", "clv"}
    (run_,) = [trajectory for trajectory in golden if trajectory["tune"] == trained]
    folder = shared(f"golden/{run_['case']}")
    model = LLaVA.from_pretrained(folder, device=device)
    io = load_file(folder / "io.safetensors", device)
    tune = Tune(
        connector="full" if "c" in run_["tune"] else "frozen",
        llm="full" if "l" in run_["tune"] else "frozen",
        vision="partial:2" if "v" in run_["tune"] else "frozen",
    )
    stage = Stage(
        tune=tune,
        learning_rate=run_["learning_rate"],
        weight_decay=run_["weight_decay"],
        warmup_ratio=run_["warmup_ratio"],
        max_grad_norm=run_["max_grad_norm"],
    )
    train.set_trainable(model, stage.tune)
    optimizer = train.make_optimizer(model, stage)
    for step in range(run_["steps"]):
        loss = model(io["input_ids"], io["images"], io["attention_mask"], io["labels"]).loss
        loss.backward()
        norm = train.update(optimizer, stage, step, run_["steps"])
        assert loss.item() == pytest.approx(run_["loss"][step], rel=1e-4)
        assert norm == pytest.approx(run_["grad_norm"][step], rel=1e-4)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(
            run_["lr"][step], rel=1e-9, abs=1e-15
        )


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no GPU")
def test_a_gpu_trains_as_the_cpu_does(recipe):
    """In float32 to rounding, compiled too, and again with the same bits; nearly so in bfloat16."""
    ways = {
        "cpu": ["device=cpu"],
        "cuda": [],
        "again": [],
        "compiled": ["compile=true"],
        "bf16": ["precision=bf16"],
    }
    made, weights = {}, {}
    for name, options in ways.items():
        file, out = recipe(name)
        run("train.py", file, *(f"train.{o}" for o in options), CUDA_VISIBLE_DEVICES="0")
        made[name], weights[name] = losses(out), (out / "model.safetensors").read_bytes()
    for name, rel in {"cuda": 1e-4, "compiled": 1e-4, "bf16": 0.02}.items():
        assert made[name] == pytest.approx(made["cpu"], rel=rel), name
    assert weights["again"] == weights["cuda"] != weights["cpu"]


# ----------------------------------------------------------------------------------- against itself


def test_ranks_packing_and_accumulation_change_nothing(recipe, whole_run):
    want = losses(whole_run)
    assert len(want) == 20 and all(map(math.isfinite, want))
    assert want[5] < want[0]
    budgets = {"accumulate": 250, "unpacked": 0}  # three to six micro-batches a step, and twelve
    for name, budget in budgets.items():
        file, out = recipe(name)
        run(
            "train.py",
            file,
            *(f"stage.{s}.micro_batch_tokens={budget}" for s in ("pretrain", "finetune")),
        )
        assert losses(out) == pytest.approx(want, rel=1e-5), name
    file, out = recipe("ranks")
    torchrun(2, file, "stage.finetune.micro_batch_tokens=0")
    assert losses(out) == pytest.approx(want, rel=1e-5)


def test_rows_of_several_samples_on_ranks_and_killed(recipe, tiny_world, tmp_path):
    """A chat template that rewrites earlier turns: here the last answer begins with a word more."""
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(tiny_world / "tokenizer", tokenizer)
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content }}{% else %}"
        "{{ ' ASSISTANT: ' + ('yes ' if loop.last else '') + m.content + eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
    )
    (tokenizer / "chat_template.jinja").write_text(template)
    options = [f"model.tokenizer={tokenizer}", "stage.finetune.template=chat", "train.save_every=2"]
    options += ["stage.pretrain.steps=1", "stage.finetune.steps=6"]

    file, whole = recipe("whole")
    said = run("train.py", file, *options, "--dry-run").stdout
    assert re.search(r"a row is \d\.\d\d samples, a sample for each answer: the chat templ", said)
    run("train.py", file, *options)
    want = losses(whole)
    assert len(want) == 7 and all(map(math.isfinite, want))

    file, out = recipe("ranks")
    on_ranks(2, file, *options, "stage.finetune.micro_batch_tokens=100")
    assert losses(out) == pytest.approx(want, rel=1e-5)

    file, out = recipe("killed")
    process = background(file, *options)
    wait_for_steps(process, out, 4)
    process.kill()
    process.communicate()
    run("train.py", file, *options)
    assert losses(out) == want
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_killed_at_any_step_the_weights_are_those_of_a_run_that_was_not(recipe, whole_run):
    whole = (whole_run / "model.safetensors").read_bytes()
    for when in (2, 9, 17):  # in the first stage before any checkpoint, in the second, near the end
        file, out = recipe(f"killed{when}")
        process = subprocess.Popen(
            [sys.executable, "train.py", str(file)], cwd=ROOT, stdout=subprocess.DEVNULL
        )
        while process.poll() is None and (
            not (out / "log.jsonl").exists() or len(losses_so_far(out)) < when
        ):
            time.sleep(0.002)
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (out / "model.safetensors").exists()
        again = run("train.py", file).stdout
        assert ("resumed" in again) == (when > 4)
        assert (out / "model.safetensors").read_bytes() == whole
        assert len(losses(out)) == 20  # no step is logged twice
        assert not (out / "checkpoints").exists()


def test_a_damaged_checkpoint_is_passed_over(recipe, whole_run):
    whole = (whole_run / "model.safetensors").read_bytes()
    file, out = recipe("cut")
    process = subprocess.Popen(
        [sys.executable, "train.py", str(file)], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    while process.poll() is None and not (out / "checkpoints" / "01-00000004").exists():
        time.sleep(0.002)
    process.kill()
    process.wait()
    with seal.alone(out / "checkpoints"):  # a seal that was under way ends after the run
        newest = seal.listed(out / "checkpoints")[-1]
    tensors = newest / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    said = run("train.py", file).stdout
    assert f"passing over {newest}" in said
    assert (out / "model.safetensors").read_bytes() == whole


def test_finished_run_says_so_and_another_recipe_is_refused(recipe):
    file, out = recipe("done")
    run("train.py", file, "stage.finetune.steps=1", "stage.pretrain.steps=1")
    before = (out / "model.safetensors").stat().st_mtime_ns
    assert (
        "finished"
        in run("train.py", file, "stage.finetune.steps=1", "stage.pretrain.steps=1").stdout
    )
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    assert "another recipe" in run("train.py", file, ok=False).stderr


def test_a_start_that_failed_on_a_mistake_can_be_mended_in_the_same_folder(recipe):
    file, out = recipe("mended")
    short = ("stage.pretrain.steps=1", "stage.finetune.steps=1")
    run("train.py", file, *short, "stage.pretrain.template=lama", ok=False)
    run("train.py", file, *short)
    assert (out / "model.safetensors").exists()


# ----------------------------------------------------------------------------------- what it trains


def test_frozen_and_partial_parts_keep_their_bits(recipe, tiny_world):
    file, out = recipe("frozen")
    run("train.py", file, "stage.pretrain.steps=1", "stage.finetune.steps=3")
    short, out1 = recipe("first")
    run(
        "train.py",
        short,
        "stage.pretrain.steps=1",
        "stage.finetune.steps=1",
        "stage.finetune.learning_rate=1e-30",  # no weight is so small that this changes it
    )
    after, before = load_file(out / "model.safetensors"), load_file(out1 / "model.safetensors")
    moved = {k for k in after if not torch.equal(after[k], before[k])}
    assert moved, "nothing trained"
    assert all(
        not k.startswith("vision_tower.") and ".layers.0." not in k and "embed" not in k
        for k in moved
    )
    must = (
        "language_model.model.layers.1.mlp.up_proj.weight",
        "language_model.model.norm.weight",
        "language_model.lm_head.weight",
        "connector.weight",
    )
    assert set(must) <= moved


def test_a_part_that_does_not_move_is_reported(recipe):
    file, _ = recipe("still")
    said = run(
        "train.py", file, "stage.pretrain.rate.vision=1e-30", "stage.finetune.steps=1"
    ).stdout
    assert "warning: pretrain: tune.vision is trainable but has not moved" in said
    assert "tune.llm is trainable" not in said


def test_log_holds_what_a_reader_wants(whole_run):
    rows = [json.loads(line) for line in (whole_run / "log.jsonl").read_text().splitlines()]
    assert [r["event"] for r in rows if r["event"] in ("start", "end")] == ["start", "end"] * 2
    step = next(r for r in rows if r["event"] == "step" and r["stage"] == "finetune")
    assert {
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens_per_s",
        "images_per_s",
        "data_wait",
        "memory_gb",
    } <= set(step)
    assert set(step["grad_norms"]) == {"llm", "connector"}
    norm = math.hypot(*step["grad_norms"].values())
    assert norm == pytest.approx(step["grad_norm"], rel=1e-4)
    assert any(r["event"] == "validation" and r["stage"] == "finetune" for r in rows)


def test_what_comes_out_opens(whole_run):
    assert LLaVA.from_pretrained(whole_run).config.template == "plain"
    again, _ = config.load([str(whole_run / "recipe.toml")], "")
    assert again.stage["finetune"].tune.llm == "partial:1"


def test_bf16_learns(recipe, whole_run):
    file, out = recipe("bf16")
    run("train.py", file, "train.precision=bf16", "train.gradient_checkpointing=true")
    got, want = losses(out), losses(whole_run)
    assert got == pytest.approx(want, rel=2e-2) and got != want


# --------------------------------------------------------------------------------------- its errors


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["stage.pretrain.learnin_rate=1"],
            'learnin_rate: unknown key; fix: did you mean "learning_rate"?',
        ),
        (["stage.pretrain.data=nowhere.json"], "no such file nowhere.json"),
        (["stage.pretrain.tune.llm=frosen"], "'frosen' is not a way to tune"),
        (["stage.pretrain.tune.vision=partial:2"], "partial:2, but there are 2 blocks"),
        (["model.llm=nowhere/at/all", "model.llm_config={}"], "no such folder"),
        (["model.tokenizer=nowhere/at/all"], "nowhere/at/all"),
        (["model.connector=mlp2x_gleu"], "mlp2x_gleu"),
        (["stage.pretrain.template=lama"], "lama"),
        (["stage.finetune.template=lama"], "lama"),
        (["train.device=cuda"], "no GPU"),
    ],
)
def test_a_mistake_is_one_line(recipe, overrides, message):
    file, out = recipe("wrong")
    done = run("train.py", file, *overrides, ok=False)
    last = done.stderr.strip().splitlines()
    assert len(last) == 1 and last[0].startswith("error: ") and "; fix: " in last[0], done.stderr
    assert message in last[0]
    assert "pretrain 1/" not in done.stdout  # it is said before the first step
    assert not (out / "model.safetensors").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '[{"id": 1'])
def test_an_empty_or_broken_data_file_is_one_line(recipe, tmp_path, text):
    file, _ = recipe("empty")
    (tmp_path / "rows.json").write_text(text)
    done = run("train.py", file, f"stage.pretrain.data={tmp_path / 'rows.json'}", ok=False)
    assert done.stderr.startswith("error: ") and len(done.stderr.strip().splitlines()) == 1


def test_a_weight_of_the_wrong_shape_is_one_line(recipe, whole_run, tmp_path):
    folder = tmp_path / "llm"
    folder.mkdir()
    state = load_file(whole_run / "model.safetensors")
    prefix = "language_model."
    from safetensors.torch import save_file

    state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    state["model.layers.0.mlp.up_proj.weight"] = torch.zeros(48, 31)
    save_file(state, folder / "model.safetensors")
    text = json.loads((whole_run / "config.json").read_text())["text_config"]
    (folder / "config.json").write_text(json.dumps(text))
    file, _ = recipe("shape")
    done = run("train.py", file, f"model.llm={folder}", "model.llm_config={}", ok=False)
    assert "up_proj.weight: shape [48, 31], the config needs [48, 32]; fix: " in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_finished_model_is_trained_on(recipe, tiny_world, tmp_path):
    """With model.checkpoint and a mixture: what trains starts where the first run ended."""
    file, first = recipe("first")
    run(
        "train.py",
        file,
        "stage.finetune.tune.llm=lora",
        "stage.finetune.lora.r=4",
        "stage.pretrain.tune.llm=frozen",
    )
    file = tmp_path / "more.toml"
    file.write_text(
        f'[model]\ncheckpoint = "{first}"\n'
        f'[train]\noutput = "{tmp_path}/more"\nprecision = "fp32"\nlog_every = 1\n'
        f'[stage.mine]\ntemplate = "plain"\nsteps = 3\nglobal_batch = 6\n'
        '[stage.mine.tune]\nllm = "lora"\nconnector = "frozen"\n'
        + "".join(
            f"[stage.mine.mixture.{name}]\n"
            f'data = "{tiny_world}/{name}.json"\nimages = "{tiny_world}/images"\n'
            for name in ("finetune", "val")
        )
    )
    run("train.py", file)
    before, after = LLaVA.from_pretrained(first), LLaVA.from_pretrained(tmp_path / "more")
    moved = {k for k, v in after.state_dict().items() if not torch.equal(v, before.state_dict()[k])}
    assert moved and all(k.startswith("language_model.model.layers.") for k in moved)
    assert (
        after.config.template == "plain"
        and after.vision_tower.processor == before.vision_tower.processor
    )
    card = (tmp_path / "more" / "README.md").read_text()
    assert f"all of {first}" in card and "finetune.json x 1.0" in card
    wrong = run(
        "train.py", file, f"train.output={tmp_path}/other", "model.image_mode=pad", ok=False
    )
    assert (
        "error: model.checkpoint: it brings its own parts and image settings; fix: " in wrong.stderr
    )
    # The first run's recipe, started from the adapters that run ended with, is its merged model
    # before any step.
    file, _ = recipe("first")
    own = config.load(
        [
            str(file),
            "stage.finetune.tune.llm=lora",
            "stage.finetune.tune.vision=frozen",
            f"stage.finetune.lora.adapter={first}/adapter",
        ],
        file,
    )[0]
    stage = own.stage["finetune"]
    start = state.build(dataclasses.replace(own, stage={"finetune": stage}), {}, stage)
    assert all(a.options.r == 4 for a in lora.adapters(start).values())
    lora.merge(start)
    theirs = before.state_dict()
    for name, value in start.state_dict().items():
        if name.startswith(("language_model.model.layers.", "connector.")):
            assert torch.allclose(value, theirs[name], atol=1e-6), name


def test_held_out_questions_are_answered_as_generate_would(recipe, tiny_world):
    """Shown at each validation, without dropout; the last ones are those of the finished model."""
    file, out = recipe("answers")
    last = (
        "train.answers=3",
        "stage.finetune.validation_every=7",
        "stage.finetune.tune.llm=lora",
        "stage.pretrain.tune.llm=frozen",
        "stage.finetune.lora.r=4",
        "stage.finetune.lora.dropout=0.5",
    )
    done = run("train.py", file, *last)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    said = [r for r in rows if r["event"] == "answer"]
    assert [r["step"] for r in said] == [7] * 3 + [14] * 3 and "wanted '" in done.stdout
    model, tok = LLaVA.from_pretrained(out).eval(), load_tokenizer(out)
    held_out = open_rows(tiny_world / "val.json", tiny_world / "images")
    for i, r in enumerate(said[3:]):
        question, answer = held_out[i]["conversations"][:2]
        assert (r["question"], r["wanted"]) == (question["value"], answer["value"])
        ids = torch.tensor(encode_prompt([question, {"from": "gpt", "value": None}], tok, "plain"))
        image = model.vision_tower.preprocess(
            load_image(tiny_world / "images" / held_out[i]["image"])
        )[None]
        stop = stop_id(tok, "plain")
        made = model.generate([ids], image, max_new_tokens=64, eos_token_id=stop)[0].tolist()
        assert r["said"] == tok.decode(made[: made.index(stop)] if stop in made else made).strip()
    spec = stage_spec(config.load([str(file)], file)[0].model, Stage(template="plain"))
    batches = list(
        validation_batches(
            held_out, spec, Stage(template="plain", global_batch=16), config.Train(workers=0)
        )
    )
    alone = Ranks(0, 1, torch.device("cpu"))
    loss = train.validate(ParallelModel(model, "none", alone), batches)
    assert loss == pytest.approx(
        [r for r in rows if r["event"] == "validation"][-1]["loss"], rel=1e-4
    )


@pytest.mark.full
def test_compiled_blocks_change_nothing(recipe):
    """train.compile, with inductor: minutes of compiling on two cores."""
    one, out = recipe("compiled")
    short = ("stage.pretrain.steps=2", "stage.finetune.steps=4")
    run("train.py", one, *short, "train.compile=true")
    two, plain = recipe("plain")
    run("train.py", two, *short)
    assert losses(out) == pytest.approx(losses(plain), rel=1e-5)
