"""Generation without a key-value cache: slow, and the check on everything that uses one.

    tokens = generate_without_cache(model, input_ids, images, max_new_tokens=9)

It takes LLaVA.generate's arguments. For each token that it appends it computes all sequences anew
from their first tokens on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from inference.beam import beam_search
from inference.generation import make_requests
from inference.sampling import sample_tokens
from packing import Item, match_images, pack_prompts, packed_attention


class Uncached:
    """The sequences of inference.beam.Beams without a cache, and the logits of their next tokens.

    All of them are computed together, as one packed row.
    """

    def __init__(self, model, prompts: list[Tensor], items: list[Item], num_beams: int):
        self.lm = model.language_model
        self.prompts = len(prompts)
        self.num_beams = num_beams

        encoded = model.encode_items(items)
        features = torch.cat(encoded) if encoded else None
        packed = pack_prompts(prompts, [len(item) for item in encoded])
        lengths = packed.cu_seqlens.diff().tolist()

        self.sequences = []  # the embeddings of each, (T, D)
        for embeddings in model.embed(packed.input_ids, features).split(lengths):
            self.sequences += [embeddings] * num_beams
        self.compute()

    def reorder(self, parents: Tensor):
        self.sequences = [self.sequences[parent] for parent in parents.tolist()]
        self.logits = self.logits[parents]

    def step(self, tokens: Tensor):
        for i, embedding in enumerate(self.lm.model.embed(tokens)):
            self.sequences[i] = torch.cat([self.sequences[i], embedding[None]])
        self.compute()

    def compute(self):
        """Set the logits (B K, V) behind all sequences."""
        x = torch.cat(self.sequences)
        lengths = torch.tensor([len(sequence) for sequence in self.sequences], device=x.device)
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        positions = torch.cat([torch.arange(len(s), device=x.device) for s in self.sequences])

        attend = packed_attention(cu_seqlens, int(lengths.max()))
        hidden_states = self.lm.model(x, positions, attend, cu_seqlens)
        last = cu_seqlens[1:].long() - 1
        self.logits = self.lm.lm_head(hidden_states[last]).float()


@torch.inference_mode()
def generate_without_cache(
    model,
    input_ids,
    images=None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    num_beams: int = 1,
    eos_token_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return what LLaVA.generate should return, (B, new). input_ids have no padding."""
    device = model.language_model.lm_head.weight.device
    prompts = [ids.to(device) for ids in input_ids]
    items = match_images(prompts, images, model.views.one_view)
    sequences = Uncached(model, prompts, items, num_beams)
    if num_beams > 1:
        return beam_search(sequences, max_new_tokens, eos_token_id)

    # Each request draws with its own seed, as in the engine.
    requests = make_requests(prompts, items, max_new_tokens, eos_token_id, generator)
    generators = [torch.Generator().manual_seed(request.seed) for request in requests]

    answers = [[] for _ in prompts]
    ended = [False] * len(prompts)
    while True:
        tokens = sample_tokens(sequences.logits, temperature, top_p, generators, top_k)
        for i, token in enumerate(tokens.tolist()):
            if not ended[i]:
                answers[i].append(token)
                ended[i] = token == eos_token_id or len(answers[i]) == max_new_tokens
        if all(ended):
            break
        sequences.step(tokens)

    padding = 0 if eos_token_id is None else eos_token_id
    padded = pad_sequence([torch.tensor(a) for a in answers], True, padding)
    return padded.to(device)
