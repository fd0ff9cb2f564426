"""Train small models under autocast on two ranks, copied and sharded: the losses must be equal.

`code` of tests/tools/training_runs.on_ranks; each rank compares what it computed.
"""

from dataclasses import replace

import torch
import torch.distributed as dist

import train
from checkpoints import peft
from config import PARTS, LoRA, Stage, Tune
from packing import EMPTY, IGNORE, IMAGE_TOKEN, ONE_VIEW, Batch
from tests.tools.small_llava import SIDE, small
from training.parallel import ParallelModel
from training.ranks import Ranks

PICTURE = 9  # tokens
TOKENS = 20
MICRO_BATCHES = 2
STEPS = 4

# What trains, in a model of which family.
WAYS = (
    ("llama", Tune(llm="full", connector="full"), LoRA()),
    ("llama", Tune(llm="partial:1", vision="full", connector="full"), LoRA()),
    ("phi", Tune(llm="frozen", vision="partial:1", connector="full"), LoRA()),
    ("llama", Tune(llm="lora", connector="full"), LoRA(r=4, dropout=0.0)),
    ("phi", Tune(llm="qlora-nf4", connector="lora"), LoRA(r=4, dropout=0.0, dora=True)),
)


def batch(seed: int) -> Batch:
    """Return a question about a picture."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (TOKENS,), generator=g)
    ids[3 : 3 + PICTURE] = IMAGE_TOKEN
    labels = ids.clone()
    labels[: 3 + PICTURE] = IGNORE
    return replace(
        EMPTY,
        input_ids=ids,
        labels=labels,
        image_at=None,
        learns_at=None,
        positions=torch.arange(TOKENS),
        cu_seqlens=torch.tensor([0, TOKENS], dtype=torch.int32),
        max_seqlen=TOKENS,
        images=torch.randn(1, 3, SIDE, SIDE, generator=g),
        shapes=[ONE_VIEW],
    )


def losses_and_norms(mode: str, family: str, tune: Tune, lora: LoRA, ranks: Ranks) -> list[float]:
    """Train for a few steps; return the loss and the gradient norm of each."""
    stage = Stage(tune=tune, lora=lora, learning_rate=1e-3, warmup_ratio=0.0)
    torch.manual_seed(0)
    model = small(family).train()
    peft.adapt(model, [stage], PARTS)
    train.set_trainable(model, tune)
    train.round_frozen(model)
    parallel_model = ParallelModel(model, mode, ranks, bf16=True)
    optimizer = train.make_optimizer(model, stage)

    numbers = []
    for step in range(STEPS):
        total = 0.0
        for i in range(MICRO_BATCHES):
            is_last = i + 1 == MICRO_BATCHES
            with parallel_model.accumulating(is_last), torch.autocast("cpu", torch.bfloat16):
                seed = (step * MICRO_BATCHES + i) * ranks.size + ranks.rank
                loss = parallel_model.loss(batch(seed)) / TOKENS
                parallel_model.backward(loss)
            total += loss.item()
        norm = train.update(optimizer, stage, step, STEPS)
        numbers += [ranks.total(total), norm]
    return numbers


def main():
    ranks = Ranks.join("cpu")
    for family, tune, lora in WAYS:
        want = losses_and_norms("ddp", family, tune, lora, ranks)
        got = losses_and_norms("fsdp", family, tune, lora, ranks)
        for w, g in zip(want, got, strict=True):
            assert w > 0 and abs(w - g) <= 1e-5 * w, (family, tune, want, got)
        if ranks.is_first:
            print(f"{family} {tune}: equal")
    dist.destroy_process_group()
