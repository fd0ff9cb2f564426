"""Make one optimizer step's gradients on the ranks that torchrun starts, and count what they cost.

    torchrun --nproc-per-node 2 -m guide.two_ranks ddp
    torchrun --nproc-per-node 2 -m guide.two_ranks fsdp
    python -m guide.two_ranks none
    torchrun --nproc-per-node 2 -m guide.two_ranks collectives

Each rank takes its share of the same four samples. Rank 0 prints the loss and the gradient norm,
which must be those of one process, then the bytes that a rank keeps, and the bytes that it sends
to the other ranks. The last are counted by the kernel of Linux, socket by socket. `collectives`
counts what one call of each collective operation sends. Chapter 14 of the guide reads what this
prints.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
import sys

import torch
import torch.distributed as dist

from config import LLaVAConfig
from inputs.sample import Sample
from model import LLaVA, init_weights
from packing import IGNORE, IMAGE_TOKEN, Batch, Item, pack_samples
from training.parallel import ParallelModel, gradient_norm, local_part
from training.ranks import Ranks, print0

TEXT = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 8,
    "image_size": 32,
}

# Of the struct tcp_info of Linux: where the number of bytes that the other side has acknowledged
# stands, a 64-bit integer.
TCPI_BYTES_ACKED = 120


def make_model() -> LLaVA:
    """Return a small LLaVA with the same random weights in every process."""
    torch.manual_seed(0)
    config = LLaVAConfig(TEXT, VISION, {"size": {"height": 32, "width": 32}})
    model = LLaVA(config)
    init_weights(model, 0.1)
    return model


def make_samples(model: LLaVA) -> list[Sample]:
    """Return four samples of 20, 35, 50 and 65 tokens; the second and the last have a picture."""
    generator = torch.Generator().manual_seed(1)
    samples = []
    for i, tokens in enumerate((20, 35, 50, 65)):
        ids = torch.randint(128, (tokens,), generator=generator)
        items = []
        if i % 2 == 1:
            ids[1 : 1 + model.image_tokens] = IMAGE_TOKEN
            pixels = torch.randint(256, (1, 3, 32, 32), generator=generator, dtype=torch.uint8)
            items.append(Item(pixels))

        # The last third of a sample is its answer.
        labels = ids.clone()
        labels[: tokens * 2 // 3] = IGNORE
        samples.append(Sample(ids, labels, items, row=i, cut=0))
    return samples


def bytes_sent() -> int:
    """Return the bytes that this process has sent over TCP and that have arrived. Linux alone."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            descriptor = os.dup(int(name))
        except OSError:  # the descriptor of the listing itself is closed by now
            continue
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            continue

        with socket.socket(fileno=descriptor) as connection:
            is_internet = connection.family in (socket.AF_INET, socket.AF_INET6)
            if is_internet and connection.type == socket.SOCK_STREAM:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                (sent,) = struct.unpack_from("<Q", info, TCPI_BYTES_ACKED)
                total += sent
    return total


def bytes_kept(model: LLaVA) -> tuple[int, int]:
    """Return the bytes of parameters and of gradients that this rank holds between two steps."""
    weights = 0
    gradients = 0
    for parameter in model.parameters():
        weights += local_part(parameter).nbytes
        if parameter.grad is not None:
            gradients += local_part(parameter.grad).nbytes
    return weights, gradients


def one_step(parallel: ParallelModel, batch: Batch, supervised: int) -> torch.Tensor:
    """Add up the gradients of one micro-batch a rank; return the loss of this rank."""
    for parameter in parallel.model.parameters():
        parameter.grad = None
    loss = parallel.loss(batch) / supervised
    parallel.backward(loss)
    return loss.detach()


def count_collectives():
    """Print what rank 0 sends for each collective, as a multiple of the tensor's bytes."""
    ranks = Ranks.join("cpu")
    whole = torch.ones(2**18)
    part = torch.ones(2**18 // ranks.size)
    collectives = {
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole),
    }
    for name, call in collectives.items():
        call()  # the first call also sets up connections
        ranks.barrier()
        before = bytes_sent()
        call()
        ranks.barrier()
        sent = bytes_sent() - before
        print0(f"{name} of {whole.nbytes} bytes: {sent / whole.nbytes:.2f} of them sent")


def count_step(mode: str):
    """Make two steps, of which the second is counted: the first one also sets up connections."""
    ranks = Ranks.join("cpu")
    model = make_model()
    samples = make_samples(model)
    mine = samples[ranks.rank :: ranks.size]
    batch = pack_samples(mine)
    supervised = int(ranks.total(batch.supervised))

    parallel = ParallelModel(model, mode, ranks)
    one_step(parallel, batch, supervised)
    ranks.barrier()
    before = bytes_sent()
    loss = one_step(parallel, batch, supervised)
    ranks.barrier()
    sent = bytes_sent() - before

    loss = ranks.total(loss.item())
    norm = gradient_norm(model.parameters()).item()
    weights, gradients = bytes_kept(model)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    print0(f"{mode}, ranks: {ranks.size}, parameters: {numbers}, supervised tokens: {supervised}")
    print0(f"loss {loss:.6f}, gradient norm {norm:.5f}")
    print0(f"rank 0 keeps {weights} bytes of weights, {gradients} bytes of gradients")
    print0(f"rank 0 sent {sent} bytes")


if __name__ == "__main__":
    if sys.argv[1] == "collectives":
        count_collectives()
    else:
        count_step(sys.argv[1])
