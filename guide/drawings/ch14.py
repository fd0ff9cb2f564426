"""Chapter 14: chunks that go around a ring, and what each rank keeps."""

import torch

from guide.drawings.svg import BLUE, GREEN, GREY, ORANGE, figure, rectangle, shade, text
from guide.two_ranks import make_model

RANKS = 4


def ring_rounds() -> list[torch.Tensor]:
    """Return how many ranks' parts each chunk of each rank has summed, before and after each round.

    The tensors of the ranks are ones, so a chunk's value is that number. (ranks, chunks) each.
    """
    held = torch.ones(RANKS, RANKS)
    rounds = [held.clone()]

    # Reduce-scatter: rank r hands on chunk r, then r - 1 and so on, and the neighbour adds.
    for step in range(RANKS - 1):
        before = held.clone()
        for rank in range(RANKS):
            chunk = (rank - step) % RANKS
            held[(rank + 1) % RANKS, chunk] += before[rank, chunk]
        rounds.append(held.clone())

    # All-gather: the complete chunks go around.
    for step in range(RANKS - 1):
        before = held.clone()
        for rank in range(RANKS):
            chunk = (rank + 1 - step) % RANKS
            held[(rank + 1) % RANKS, chunk] = before[rank, chunk]
        rounds.append(held.clone())
    return rounds


def ring() -> str:
    """Draw the rounds of an all-reduce in a ring of four ranks."""
    body = text(20, 24, "reduce-scatter: add and hand on", 13, GREY)
    body += text(20, 172, "all-gather: hand on what is complete", 13, GREY)
    cell = 24
    for i, held in enumerate(ring_rounds()):
        if i < RANKS:
            x, y = 90 + i * 156, 48
        else:
            x, y = 90 + (i - RANKS + 1) * 156, 196
        name = f"after round {i}"
        if i == 0:
            name = "before"
        body += text(x, y - 6, name, 12)
        for rank, row in enumerate(held.tolist()):
            if i == 0:
                body += text(x - 8, y + rank * cell + 16, f"rank {rank}", 12, GREY, "end")
            for chunk, parts in enumerate(row):
                left, top = x + chunk * cell, y + rank * cell
                colour = shade(parts - 1, 0, 2 * RANKS)
                if parts == RANKS:
                    colour = "#bfe3d4"
                body += rectangle(left, top, cell - 2, cell - 2, colour, GREY)
                body += text(left + 11, top + 16, f"{parts:.0f}", 12, anchor="middle")
    body += text(20, 316, "The number is of the ranks whose parts a chunk has summed.", 13, GREY)
    return figure(720, 332, body, "An all-reduce in a ring: six rounds for four ranks.")


def memory() -> str:
    """Draw what each of two ranks keeps with DDP and with FSDP, of the chapter's model."""
    total = sum(parameter.nbytes for parameter in make_model().parameters()) / 1e6
    parts = (("weights", BLUE, 1), ("gradients", ORANGE, 1), ("moments of AdamW", GREEN, 2))
    body = ""
    kept = (
        ("one rank", 1, 30),
        ("DDP, rank 0", 1, 76),
        ("DDP, rank 1", 1, 102),
        ("FSDP, rank 0", 1 / 2, 148),
        ("FSDP, rank 1", 1 / 2, 174),
    )
    for name, share, y in kept:
        x = 120
        body += text(x - 10, y + 15, name, 13, anchor="end")
        for _, colour, times in parts:
            width = total * share * times * 150
            body += rectangle(x, y, width, 20, colour, radius=2, opacity=0.8)
            number = f"{total * share * times:.2f} MB"
            body += text(x + width / 2, y + 15, number, 12, "#ffffff", "middle")
            x += width
    x = 120
    for name, colour, _ in parts:
        body += rectangle(x, 218, 14, 14, colour, radius=2)
        body += text(x + 20, 230, name, 13)
        x += 60 + 7.4 * len(name)
    return figure(720, 250, body, "What each of two ranks keeps between steps.")


FIGURES = {"14-ring.svg": ring, "14-memory.svg": memory}
