"""Several ranks, with and without sharding, compute what one rank does."""

import json
import weakref
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import config
import train
from config import Stage, Tune, UserError
from inference import generation
from inference.engine import is_plain
from packing import EMPTY
from tests.tools import bf16_modes, mixed_batches
from tests.tools.environment import run
from tests.tools.small_llava import small
from tests.tools.training_runs import NATIVE, TRAIN, losses, on_ranks
from training import parallel, state
from training.parallel import ParallelModel
from training.ranks import Ranks


@pytest.fixture
def one_rank():
    """Return a rank that is a process group of its own, on which fsdp does all that it does."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(0, 1, torch.device("cpu"))
    dist.destroy_process_group()


def sharded(ranks: Ranks, **tune) -> ParallelModel:
    """Return a small model in shards that computes under autocast."""
    model = small().train()
    train.set_trainable(model, Tune(**tune))
    return ParallelModel(model, "fsdp", ranks, bf16=True)


def text(tokens: int = 20):
    ids = torch.arange(5, 5 + tokens)
    labels = ids.clone()
    labels[0] = -100
    cu = torch.tensor([0, tokens], dtype=torch.int32)
    return replace(
        EMPTY,
        input_ids=ids,
        labels=labels,
        image_at=None,
        learns_at=None,
        positions=torch.arange(tokens),
        cu_seqlens=cu,
        max_seqlen=tokens,
    )


def step(parallel_model: ParallelModel):
    """Make an optimizer step, as the training loop does."""
    stage = Stage(warmup_ratio=0.0, learning_rate=1e-3)
    optimizer = train.make_optimizer(parallel_model.model, stage)
    with torch.autocast("cpu", torch.bfloat16):
        loss = parallel_model.loss(text())
        parallel_model.backward(loss)
    assert train.update(optimizer, stage, 0, 10) > 0


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


MODES = (
    ["model.image_mode=anyres"],
    ["model.image_mode=anyres_max", "model.image_views=2"],
    NATIVE,
)


@pytest.mark.parametrize("mode_change", MODES, ids=lambda c: c[0])
def test_ranks_with_pictures_videos_and_text_change_nothing(
    recipe, tiny_world, tmp_path, mode_change
):
    """A rank has tiles where another has a clip or text alone: none waits, losses are equal.

    Or it has pictures of other grids.
    """
    rows = json.loads((tiny_world / "finetune.json").read_text())[:60]
    for row in rows[::3]:
        if name := row.pop("image", None):
            frames = [Image.open(tiny_world / "images" / name).rotate(90 * i) for i in range(3)]
            row["video"] = f"{row['id']}.gif"
            frames[0].save(
                tmp_path / row["video"], save_all=True, append_images=frames[1:], duration=100
            )
    for i, row in enumerate(rows):
        if "image" not in row:
            continue
        picture = Image.open(tiny_world / "images" / row["image"])
        size = (20 + 7 * (i % 9), 20 + 5 * (i % 7))

        # Some pictures are wide, and some rows have two.
        if i % 4 == 0:
            size = (96, 90)
        row["image"] = f"{row['id']}.png"
        picture.resize(size).save(tmp_path / row["image"])
        if i % 4 == 1:
            row["image"] = [row["image"], row["image"]]
            row["conversations"][0]["value"] = "<image>\n" + row["conversations"][0]["value"]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    change = [
        f"stage.finetune.data={tmp_path}/rows.json",
        f"stage.finetune.images={tmp_path}",
        "stage.finetune.validation=",
        "stage.finetune.micro_batch_tokens=60",
        "stage.finetune.steps=4",
        "stage.pretrain.steps=2",
        "model.connector=mlp2x_gelu",
        "model.frames=3",
        *mode_change,
    ]
    file, out = recipe("alone")
    run("train.py", file, *change)
    want, model = losses(out), load_file(out / "model.safetensors")
    for mode in ("ddp", "fsdp"):
        file, out = recipe(mode)
        on_ranks(2, file, *change, f"train.parallel={mode}")
        assert len(want) == 6 and losses(out) == pytest.approx(want, rel=1e-5), mode
        got = load_file(out / "model.safetensors")
        assert got.keys() == model.keys()
        assert all(torch.allclose(got[k], model[k], rtol=1e-3, atol=1e-5) for k in model)


def test_packed_batches_of_all_kinds_are_each_row_alone_with_every_connector():
    """Losses and gradients of text, pictures, tiles and videos, in one process and on two ranks."""
    code = "from tests.tools import mixed_batches; mixed_batches.main()"
    assert on_ranks(2, code=code).stdout.count("equal") == len(mixed_batches.CASES)


def test_sharded_bf16_is_what_copies_compute():
    """Matrices are gathered in bfloat16 instead of being rounded: the same bits are multiplied."""
    code = "from tests.tools import bf16_modes; bf16_modes.main()"
    done = on_ranks(2, code=code)
    assert done.stdout.count("equal") == len(bf16_modes.WAYS)


class Rounded(TorchDispatchMode):
    """Keeps an eye on matrices that were rounded to bfloat16."""

    def __init__(self, shapes: set[tuple]):
        super().__init__()
        self.shapes = shapes
        self.made = []

    def alive(self) -> int:
        return sum(tensor() is not None for tensor in self.made)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op is torch.ops.aten._to_copy.default and tuple(out.shape) in self.shapes:
            if out.dtype == torch.bfloat16:
                self.made.append(weakref.ref(out))
        return out


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_rounded_copy_of_a_shard_is_kept(one_rank, checkpointing):
    """Autocast kept a bfloat16 copy of every matrix on every rank, from fp32 ones it gathered."""
    parallel_model = sharded(one_rank, llm="full", vision="full", connector="full")
    model = parallel_model.model
    model.language_model.model.gradient_checkpointing = checkpointing
    blocks = model.language_model.blocks

    shapes = set()
    gathered = []
    for block in blocks:
        shapes |= {tuple(p.shape) for p in block.parameters() if p.dim() == 2}
        block.mlp.register_forward_pre_hook(
            lambda mlp, _: gathered.append((mlp.up_proj.weight.dtype, mlp.up_proj.weight.shape))
        )
    shapes |= {shape[::-1] for shape in shapes}

    with torch.autocast("cpu", torch.bfloat16):
        with Rounded(shapes) as rounded:
            loss = parallel_model.loss(text())
        assert rounded.alive() == 0
        parallel_model.backward(loss)

    # A block's matrices come in bfloat16; it is a shard again, and learns in float32.
    assert set(gathered) == {(torch.bfloat16, (80, 48))}
    for name, p in model.named_parameters():
        assert isinstance(p, DTensor) and p.dtype == torch.float32, name
        if name.startswith("language_model"):
            assert p.grad.dtype == torch.float32


def test_the_mesh_is_of_the_ranks_and_not_of_the_torch_build(one_rank, monkeypatch):
    """A torch that is built for CUDA names it as the accelerator, even without a GPU."""
    monkeypatch.setattr(torch._C, "_get_accelerator", lambda *_: torch.device("cuda"))
    step(sharded(one_rank, llm="full", connector="full"))


@pytest.mark.filterwarnings("error")
def test_ddp_warns_of_nothing_that_its_user_could_change(one_rank):
    model = small().train()
    train.set_trainable(model, Tune(llm="full"))
    ParallelModel(model, "ddp", one_rank)


def test_validation_leaves_shards_and_no_engine_behind(one_rank):
    """Even after an error: the run goes on when an answer has failed."""
    parallel_model = sharded(one_rank, llm="full", connector="full")
    model = parallel_model.model
    step(parallel_model)
    for fails in (False, True):
        try:
            with parallel_model.forward_only(), torch.autocast("cpu", torch.bfloat16):
                # The head is whole here, the blocks are not: a captured step would hold their
                # collectives.
                assert not isinstance(model.language_model.lm_head.weight, DTensor)
                assert not is_plain(model.language_model)
                model.generate([torch.arange(3, 20)], max_new_tokens=3)
                assert model in generation.LAST_ENGINES
                if fails:
                    raise ValueError
        except ValueError:
            pass
        assert model not in generation.LAST_ENGINES and model.training
        assert all(isinstance(p, DTensor) for p in model.parameters())
    assert is_plain(small().language_model)
    step(parallel_model)


def test_blocks_come_to_the_device_one_by_one(one_rank, monkeypatch):
    """The model as a whole may not fit there."""
    moved = []
    to = torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", lambda m, device: moved.append(m) or to(m, device))
    parallel_model = sharded(one_rank, llm="full")
    assert not moved
    assert isinstance(parallel_model.model.language_model.blocks[0], FSDPModule)

    alone = small()
    ParallelModel(alone, "none", one_rank)
    assert moved == [alone]


FREED = """
import gc, weakref
from training import state
gc.disable()
models = []
def build(*args, real=state.build):
    assert all(model() is None for model in models), "an earlier stage's model is still there"
    model = real(*args)
    models.append(weakref.ref(model))
    return model
state.build = build
"""


def test_a_stage_s_model_is_freed_before_the_next_is_built(recipe):
    file, out = recipe("freed")
    short = ("stage.pretrain.steps=1", "stage.finetune.steps=1", "stage.finetune.validation=")
    on_ranks(2, file, *short, "train.parallel=fsdp", code=FREED + TRAIN)
    assert len(losses(out)) == 2


COUNTED = """
import data
def token_counts(rows, spec, workers, real=data.token_counts):
    print("counted by", workers)
    return real(rows, spec, workers)
data.token_counts = token_counts
"""


@pytest.mark.parametrize("workers, here, processes", [(0, 2, 2), (3, 2, 3), (0, 1, 1)])
def test_tokens_are_counted_by_as_many_processes_as_ranks_wait_here(
    recipe, monkeypatch, workers, here, processes
):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    file, _ = recipe(f"counted-{workers}-{here}")
    short = ("stage.pretrain.steps=1", "stage.finetune.steps=1", "stage.finetune.validation=")
    said = on_ranks(2, file, *short, f"train.workers={workers}", code=COUNTED + TRAIN).stdout
    assert said.count("counted by") == said.count(f"counted by {processes}") == 4


MEASURED = """
import weakref
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training import parallel, state

def is_mapped(address):
    with open("/proc/self/maps") as file:
        for line in file:
            first, last = (int(end, 16) for end in line.split()[0].split("-"))
            if first <= address < last:
                return ".safetensors" in line
    return False

class Float32Bytes(TorchDispatchMode):
    \"\"\"Counts the memory of float32 tensors on the CPU, but not what is mapped from files.\"\"\"

    def __init__(self):
        super().__init__()
        self.alive = {}
        self.peak = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and not isinstance(t, DTensor):
                if t.is_cpu and t.dtype == torch.float32:
                    self.note(t.untyped_storage())
        return out

    def note(self, storage):
        key = storage._cdata
        if key not in self.alive and not is_mapped(storage.data_ptr()):
            self.alive[key] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, key, None)
            self.peak = max(self.peak, sum(self.alive.values()))

class Measured(parallel.ParallelModel):
    def __init__(self, model, *args):
        whole = 4 * sum(p.numel() for p in model.parameters())
        with mode:
            super().__init__(model, *args)
        mode.alive.clear()
        print("peak", mode.peak / whole, flush=True)

def build(*args, real=state.build):
    global mode
    mode = Float32Bytes()
    with mode:
        return real(*args)

state.build = build
"""
HOOK = "import train\ntrain.ParallelModel = Measured\ntrain.command_line.cli(train.main, '')\n"


def published(folder, family: str = "llama", dtype=torch.bfloat16, **text):
    """Write a small model as others publish theirs. text: fields of its language model."""
    small(family, vocab=512, sizes=text).to(dtype).save(folder)
    return folder


def of_checkpoint(recipe, folder, world) -> str:
    """Return the text of a recipe that begins with a finished model."""
    model = f'[model]\ncheckpoint = "{folder}"\ntokenizer = "{world}/tokenizer"\n'
    return model + "[train]" + recipe.partition("[train]")[2]


def test_a_rank_never_holds_the_whole_model_in_float32(recipe, tiny_world, tmp_path):
    """Each one made all of it, and kept it until the last block was in shards."""
    text = {"num_hidden_layers": 12, "hidden_size": 96, "intermediate_size": 240}
    folder = published(tmp_path / "published", **text)
    file, out = recipe("shards")
    file.write_text(of_checkpoint(file.read_text(), folder, tiny_world))
    short = ("stage.pretrain.steps=1", "stage.finetune.steps=1", "stage.finetune.validation=")
    said = on_ranks(2, file, *short, "train.parallel=fsdp", code=MEASURED + HOOK).stdout
    peaks = [float(line.split()[1]) for line in said.splitlines() if line.startswith("peak ")]

    # A half, a block of twelve, and change. Of two stages and two ranks; the second stage begins
    # with a checkpoint.
    assert len(peaks) == 4 and max(peaks) < 0.7, peaks

    alone, want = recipe("alone")
    alone.write_text(of_checkpoint(alone.read_text(), folder, tiny_world))
    on_ranks(1, alone, *short)
    assert losses(out) == pytest.approx(losses(want), rel=1e-5)


WAYS_TO_TUNE = (
    Tune(llm="full", vision="partial:1", connector="full"),
    Tune(llm="lora", connector="lora"),
    Tune(llm="qlora-nf4", vision="lora", connector="full"),
    Tune(llm="frozen", vision="qlora-int8"),
)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", torch.float16),
        ("llama", torch.float32),
        ("qwen2", torch.bfloat16),  # which ties its head
    ],
)
def test_what_stays_in_its_file_becomes_the_same_bits(tmp_path, family, dtype):
    folder = published(tmp_path / "published", family, dtype)
    for tune in WAYS_TO_TUNE:
        stage = Stage(tune=tune, lora=config.LoRA(r=4, dora=True))
        loaded = config.Recipe(model=config.Model(checkpoint=str(folder)), stage={"one": stage})

        # A checkpoint of what an earlier stage trained, in float32.
        start = state.build(loaded, {}, stage)
        tensors = {}
        for i, (name, p) in enumerate(start.named_parameters()):
            if i % 3 == 0:
                tensors[f"weight.{name}"] = torch.randn(p.shape, generator=seeded(i))

        for saved in ({}, tensors):
            models = []
            for mapped in (False, True):
                model = state.build(loaded, saved, stage, mapped)
                train.set_trainable(model, tune)
                dtypes = state.full_precision(model)
                dtypes |= dict.fromkeys(train.frozen_matrices(model), torch.bfloat16)
                ParallelModel(model, "none", Ranks(0, 1, torch.device("cpu")), True, dtypes)
                models.append(model)
            want, got = (model.state_dict() for model in models)
            assert got.keys() == want.keys()
            for name, t in want.items():
                assert got[name].dtype == t.dtype and torch.equal(got[name], t), (tune, name)
            head = models[1].language_model
            is_tied = head.lm_head.weight is head.model.embed_tokens.weight
            assert is_tied == (family == "qwen2")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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
