"""Beam search: the most probable answers found by keeping several beginnings of each at once.

    sequences = Beams(model, prompts, features, beams, max_new_tokens)
    tokens = beam_search(sequences, max_new_tokens, eos_token_id)

`Beams` computes: it holds the key-value cache and gives the logits of the next tokens.
`beam_search` decides, with one `Search` for each prompt: which beams go on, which answers are
finished, and when a prompt is done.

B prompts, K beams of each, V vocabulary. Beam k of prompt b is sequence b K + k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from inference.cache import Cache


class Beams:
    """The B K sequences of a beam search, with `logits` (B K, V) for the next token of each."""

    def __init__(self, model, prompts, features: Tensor | None, beams: int, max_new_tokens: int):
        """Read B prompts, and start K beams of each. A prompt is computed once for all its beams.

        model: a LLaVA. prompts: what packing.pack_prompts returns. features (P, D): those of all
        image positions in the prompts, None if there are none.
        """
        self.lm = model.language_model
        self.beams = beams
        ids, positions, cu_seqlens, max_seqlen = prompts
        self.prompts = len(cu_seqlens) - 1

        x = model.embed(ids, features)
        self.cache = Cache(self.lm.config, self.prompts, max_seqlen + max_new_tokens, like=x)
        attend = self.cache.prefill(cu_seqlens, max_seqlen, positions)
        hidden_states = self.lm.model(x, positions, attend)
        last = cu_seqlens[1:].long() - 1
        self.logits = self.lm.lm_head(hidden_states[last]).float()

        prompt_of_beam = torch.arange(self.prompts, device=ids.device).repeat_interleave(beams)
        self.reorder(prompt_of_beam)

    def reorder(self, rows: Tensor):
        """Let sequence i continue what sequence rows[i] was."""
        self.cache.reorder(rows)
        self.logits = self.logits[rows]

    def step(self, tokens: Tensor):
        """Append a token (B K,) to each sequence and compute the next logits."""
        positions = self.cache.lengths
        x = self.lm.model.embed(tokens)
        hidden_states = self.lm.model(x, positions, self.cache.step())
        self.logits = self.lm.lm_head(hidden_states).float()


def beam_search(sequences: Beams, max_new_tokens: int, eos_token_id: int | None) -> Tensor:
    """Return the best answer to each prompt, (B, new), padded with eos_token_id (or 0).

    As Hugging Face's defaults have it: each step looks at the 2 K best continuations, a finished
    answer scores its sum of log-probabilities / its number of tokens, and a prompt is done when no
    open beam can still beat the worst of its K best finished answers.
    """
    device = sequences.logits.device
    prompts, beams = sequences.prompts, sequences.beams
    searches = [Search(beams) for _ in range(prompts)]

    # The beams of a prompt start equal, so at first only one of them may branch.
    scores = torch.full((prompts, beams), -1e9, device=device)
    scores[:, 0] = 0

    for length in range(1, max_new_tokens + 1):
        log_probabilities = sequences.logits.log_softmax(-1).view(prompts, beams, -1)
        total = scores[..., None] + log_probabilities  # (B, K, V)
        vocabulary = total.size(-1)
        best = total.flatten(1).topk(min(2 * beams, beams * vocabulary))  # (B, 2 K)

        # Every prompt picks its K beams of the next step.
        rows = []
        tokens = []
        for b, search in enumerate(searches):
            going = search.advance(
                best.values[b].tolist(), best.indices[b].tolist(), vocabulary, eos_token_id
            )
            scores[b] = torch.tensor([c.score for c in going], device=device)
            for candidate in going:
                rows.append(b * beams + candidate.beam)
                tokens.append(candidate.token)

        if all(search.done for search in searches) or length == max_new_tokens:
            break
        sequences.reorder(torch.tensor(rows, device=device))
        sequences.step(torch.tensor(tokens, device=device))

    answers = []
    for search, open_scores in zip(searches, scores.tolist(), strict=True):
        answers.append(torch.tensor(search.best(open_scores)))
    padding = 0 if eos_token_id is None else eos_token_id
    padded = pad_sequence(answers, batch_first=True, padding_value=padding)
    return padded.to(device)


@dataclass
class Candidate:
    """A beam that goes on: its score, the beam that it continues, and the token it appends."""

    score: float  # sum of log-probabilities
    beam: int
    token: int


class Search:
    """The beams of one prompt, and its finished answers."""

    def __init__(self, beams: int):
        self.beams = beams
        self.open: list[list[int]] = [[] for _ in range(beams)]  # the tokens of each beam
        self.finished: list[tuple[float, list[int]]] = []  # (score, tokens), the best first
        self.done = False

    def advance(
        self, scores: list[float], choices: list[int], vocabulary: int, eos: int | None
    ) -> list[Candidate]:
        """Return the K beams that go on, and note those that end with this token.

        scores and choices: the 2 K best continuations, the best first. A choice is beam * V +
        token. There are 2 K because up to K of them may end.
        """
        length = len(self.open[0]) + 1
        going: list[Candidate] = []
        for rank, (score, choice) in enumerate(zip(scores, choices, strict=True)):
            beam, token = divmod(choice, vocabulary)
            if token != eos:
                going.append(Candidate(score, beam, token))
            elif rank < self.beams and not self.done:
                # An end counts only if it is itself among the K best continuations.
                self.finished.append((score / length, self.open[beam] + [token]))
            if len(going) == self.beams:
                break

        # Keep the K best answers. The search is done when even the best continuation does not
        # score higher than the worst of them.
        self.finished.sort(key=lambda answer: -answer[0])
        self.finished = self.finished[: self.beams]
        if len(self.finished) == self.beams and self.finished[-1][0] >= scores[0] / length:
            self.done = True

        self.open = [self.open[candidate.beam] + [candidate.token] for candidate in going]
        return going

    def best(self, open_scores: list[float]) -> list[int]:
        """Return the tokens of the best answer. If the search is not done, open beams count too."""
        answers = list(self.finished)
        if not self.done:
            for score, tokens in zip(open_scores, self.open, strict=True):
                answers.append((score / len(tokens), tokens))
        _, tokens = max(answers, key=lambda answer: answer[0])
        return tokens
