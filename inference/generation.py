"""The two ways of LLaVA.generate: `generate` with the engine, `generate_with_beams`.

The engine of a model's last call is kept. What its cache holds (a picture that was asked about,
the turns of a chat so far) can then be the beginning of the next call's prompts. `engine_for`, at
the end, decides when that is allowed.

B prompts, D width, n tokens of an image.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from inference.beam import Beams, beam_search
from inference.engine import Engine, Request
from packing import Item, count_images, pack_prompts


def generate(
    model,
    prompts: list[Tensor],
    items: list[Item],
    max_new_tokens: int,
    eos_token_id: int | None,
    generator: torch.Generator | None,
    stream: Callable[[list[int]], None] | None,
    **options,
) -> Tensor:
    """Return the tokens of the answers, (B, new); a short one is padded with eos_token_id (or 0).

    prompts: ids (T,) on the model's device. items: one for each IMAGE_TOKEN in them, in order.
    stream: called after each step with its B tokens, padded likewise.
    options: temperature, top_p, top_k and until of every Request.
    """
    requests = make_requests(prompts, items, max_new_tokens, eos_token_id, generator, **options)
    padding = 0
    if eos_token_id is not None:
        padding = eos_token_id

    # The engine gives tokens of those requests only that are still being decoded.
    def stream_step(step: list[tuple[Request, int]]):
        tokens = [padding] * len(prompts)
        for request, token in step:
            tokens[request.tag] = token
        stream(tokens)

    on_step = None
    if stream is not None:
        on_step = stream_step

    # The answers come in the order in which they end. Their tags say where they belong.
    answers = [None] * len(prompts)
    engine = engine_for(model, len(prompts))
    for request, tokens in engine.serve(requests, on_step):
        answers[request.tag] = torch.tensor(tokens)

    padded = pad_sequence(answers, batch_first=True, padding_value=padding)
    return padded.to(prompts[0].device)


def make_requests(
    prompts: list[Tensor],
    items: list[Item],
    max_new_tokens: int,
    eos_token_id: int | None,
    generator: torch.Generator | None,
    **options,
) -> list[Request]:
    """Return a request for each prompt, with its items, a seed of its own and its number as tag.

    The seeds are drawn from `generator`, or from torch's global one, before anything is decoded.
    """
    # torch draws only on the device that a generator belongs to.
    device = "cpu"
    if generator is not None:
        device = generator.device
    seeds = torch.randint(2**62, (len(prompts),), generator=generator, device=device)

    stop = ()
    if eos_token_id is not None:
        stop = (eos_token_id,)

    requests = []
    remaining = iter(items)
    for number, (ids, seed) in enumerate(zip(prompts, seeds.tolist(), strict=True)):
        placeholders = count_images(ids)
        request = Request(
            ids=ids,
            images=list(islice(remaining, placeholders)),
            max_new_tokens=max_new_tokens,
            seed=seed,
            stop=stop,
            tag=number,
            **options,
        )
        requests.append(request)
    return requests


def generate_with_beams(
    model,
    prompts: list[Tensor],
    items: list[Item],
    max_new_tokens: int,
    num_beams: int,
    eos_token_id: int | None,
) -> Tensor:
    """Return the best answers that beam search finds, (B, new). Arguments as in `generate`."""
    encoded = model.encode_items(items)  # (n, D) of each
    features = None
    if encoded:
        features = torch.cat(encoded)

    packed = pack_prompts(prompts, [len(image_features) for image_features in encoded])
    beams = Beams(model, packed, features, num_beams, max_new_tokens)
    return beam_search(beams, max_new_tokens, eos_token_id)


# -- the engine of the last call -------------------------------------------------------------------


class WeightState(NamedTuple):
    """Two numbers of which one changes when a tensor is replaced or written to."""

    address: int
    version: int  # how often it has been written to


@dataclass
class LastEngine:
    """An engine, and the state of the model's weights when it was used."""

    engine: Engine
    weights: list[WeightState]


# Weak keys: an engine, with its cache, is freed together with its model.
LAST_ENGINES: weakref.WeakKeyDictionary[nn.Module, LastEngine] = weakref.WeakKeyDictionary()


def engine_for(model, rows: int) -> Engine:
    """Return the engine of the model's last call, or a new one if that does not fit any more.

    It fits if it has as many rows and no weight has changed since. A model in training gets a new
    engine for each call: its weights change all the time, and the cache's memory is needed.
    """
    # A proxy: with a reference to the model the entry would keep its own key alive.
    proxy = weakref.proxy(model)

    # Taken out in any case: an engine that does not fit any more is freed.
    last = LAST_ENGINES.pop(model, None)
    if model.training:
        last = None
        return Engine(proxy, rows)

    weights = weights_state(model)
    if last is not None and len(last.engine.rows) == rows and last.weights == weights:
        engine = last.engine
    else:
        # Its cache is let go before the new one is made: both may not fit.
        last = None
        engine = Engine(proxy, rows)
    LAST_ENGINES[model] = LastEngine(engine, weights)
    return engine


def forget_engine(model):
    """Drop the engine of the model's last call, because its cache is of weights that have changed.

    `weights_state` does not see every change: a fused optimizer writes to a weight without counting
    it. Whoever takes optimizer steps between two calls says so here.
    """
    LAST_ENGINES.pop(model, None)


def weights_state(model: nn.Module) -> list[WeightState]:
    """Return the states of all weights of a model, which differ after any of them has changed."""
    states = []
    for tensor in chain(model.parameters(), model.buffers()):
        # Tensors made in inference mode do not count how often they are written to.
        version = 0
        if not tensor.is_inference():
            version = tensor._version
        states.append(WeightState(tensor.data_ptr(), version))
    return states
