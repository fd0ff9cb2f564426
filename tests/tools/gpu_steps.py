"""Steps of training and of decoding on the device of fake_gpu.py, and where each of them waits.

python -m tests.tools.gpu_steps          # prints a line of JSON: waits of every step, by name
"""

from __future__ import annotations

import json

import torch

import lora
from config import LoRA, Stage
from inference.cache import Cache
from inputs.sample import Sample
from model import LLaVA, rope_table
from packing import (
    IGNORE,
    IMAGE_TOKEN,
    Batch,
    Item,
    ItemShape,
    pack_prompts,
    pack_samples,
    packed_attention,
)
from tests.tools import fake_gpu
from tests.tools.small_llava import NAFLEX, SIDE, small
from train import make_optimizer

ANYRES = {"image_mode": "anyres"}
ANYRES_MAX = {"image_mode": "anyres_max", "image_grids": "4x4", "image_views": 1}


def sample(model: LLaVA, shapes: list[ItemShape]) -> Sample:
    """Return a sample of items of these shapes, and a few tokens of which most are supervised."""
    ids = [3]
    for shape in shapes:
        ids += [IMAGE_TOKEN] * model.views.positions(shape)
    labels = [IGNORE] * (len(ids) + 2) + list(range(7, 15))
    ids += list(range(5, 15))

    items = []
    for shape in shapes:
        pixels = torch.randint(0, 255, model.views.pixels_size(shape), dtype=torch.uint8)
        items.append(Item(pixels, shape))
    return Sample(torch.tensor(ids), torch.tensor(labels), items, 0, 0)


def training_step(model: LLaVA, batches: list[Batch]):
    """Do what train.train_stage does on the device, up to the reading of loss and norm."""
    optimizer = make_optimizer(model, Stage())
    for batch in batches:
        loss = model.loss(batch.to("gpu")) / 7
        loss.backward()

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def waits_of_training(
    tune: str = "full", checkpointing: bool = False, mode: str = "square", **config
) -> list[str]:
    """Return the waits of a step of two micro-batches, with pictures and of text alone."""
    model = small(**config).train()
    if tune == "full":
        model.requires_grad_(True)
    else:
        if tune != "lora":
            lora.quantize(model.language_model, tune)
        lora.apply(model.language_model, LoRA(r=4, dropout=0.1))
    model.language_model.model.gradient_checkpointing = checkpointing
    model.vision_tower.gradient_checkpointing = checkpointing

    shapes = [ItemShape(), ItemShape()]
    if mode in ("tiled", "native"):
        shapes = [model.views.shape((100, 50)), model.views.shape((50, 100))]
    if mode == "video":
        shapes = [ItemShape(3)]
    both = pack_samples([sample(model, shapes), sample(model, []), sample(model, [])])
    pictures = len(shapes)
    batches = [
        both.part(slice(0, 2), slice(0, pictures)),
        both.part(slice(2, 3), slice(pictures, pictures)),
    ]

    with fake_gpu.watch() as watch:
        model.to("gpu")
        send_constants(model)
        watch.waits.clear()
        training_step(model, batches)
    return watch.waits


def send_constants(model: LLaVA):
    """Let what is copied to the device once, the colours' mean and deviation, be there already."""
    shape = model.views.largest()[0]
    pixels = torch.zeros(model.views.pixels_size(shape), dtype=torch.uint8)
    model.vision_tower.processor.normalise(pixels.to("gpu", non_blocking=True))


@torch.no_grad()
def waits_of_decoding() -> list[str]:
    """Return the waits of the prefill of two prompts, one with a picture, and of one step."""
    model = small()
    prompts = [torch.tensor([3, IMAGE_TOKEN, 5]), torch.tensor([4, 5])]
    packed = pack_prompts(prompts, [model.image_tokens])
    pixels = torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8)
    with fake_gpu.watch() as watch:
        model.to("gpu")
        send_constants(model)
        cache = Cache(model.language_model.config, 2, 64, like=torch.zeros(1, 48, device="gpu"))
        watch.waits.clear()

        features = torch.cat(model.encode_items([Item(pixels)]))
        row = packed.to("gpu")
        x = model.embed(row.input_ids, features, row.image_at)
        hidden_states = model.language_model.model(x, row.positions, cache.prefill(row))
        last = hidden_states.index_select(0, row.cu_seqlens[1:].long() - 1)
        tokens = model.language_model.lm_head(last).argmax(-1)

        positions = cache.lengths
        x = model.language_model.model.embed(tokens)
        model.language_model.model(x, positions, cache.step())
    return watch.waits


def operations_of_a_block() -> list[int]:
    """Return the operations that a block's forward pass makes, and those of its backward pass."""
    model = small()
    block = model.language_model.blocks[0]
    cu_seqlens = torch.tensor([0, 5], dtype=torch.int32)
    with fake_gpu.watch() as watch:
        block.to("gpu")
        x = torch.randn(5, 48, device="gpu", requires_grad=True)
        rope = rope_table(torch.arange(5, device="gpu"), 8, 1e4)
        attend = packed_attention(cu_seqlens.to("gpu"), 5)
        gradient = torch.ones(5, 48, device="gpu")

        watch.counts.clear()
        y = block(x, rope, attend)
        forward = watch.counts.total()
        y.backward(gradient)
    return [forward, watch.counts.total() - forward]


def main():
    """Print the waits of all steps, and how many operations a block is."""
    found = {
        "full": waits_of_training(),
        "checkpointing": waits_of_training(checkpointing=True),
        "lora": waits_of_training("lora"),
        "nf4": waits_of_training("nf4"),
        "int8": waits_of_training("int8"),
        "siglip, gemma": waits_of_training(family="gemma", tower="siglip"),
        "phi, resampler": waits_of_training(family="phi", connector="resampler"),
        "anyres": waits_of_training(mode="tiled", **ANYRES),
        "anyres_max": waits_of_training(mode="tiled", **ANYRES_MAX),
        "anyres_max, video": waits_of_training(mode="video", **ANYRES_MAX),
        "tiles": waits_of_training(mode="tiled", image_mode="tiles"),
        "video": waits_of_training(mode="video"),
        "naflex": waits_of_training(mode="native", **NAFLEX),
        "decoding": waits_of_decoding(),
        "operations": operations_of_a_block(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
