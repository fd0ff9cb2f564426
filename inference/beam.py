"""Beam search: the most probable answers, found by keeping several beginnings of each at once.

    packed = pack_prompts(prompts, counts)
    beams = Beams(model, packed, features, num_beams, max_new_tokens)
    tokens = beam_search(beams, max_new_tokens, eos_token_id)

`Beams` computes: it holds the key-value cache and gives the logits of the next tokens.
`beam_search` is the loop. In it one `Search` for each prompt decides which beams go on, which
answers are finished, and when the prompt is done.

B prompts, K beams of each, T tokens of the packed prompts, D width, V vocabulary.
Beam k of prompt b is sequence b K + k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from config import UserError
from inference.cache import Cache
from packing import PackedRow


class Beams:
    """The B K sequences of a beam search, with `logits` (B K, V) for the next token of each."""

    def __init__(
        self,
        model,
        packed: PackedRow,
        features: Tensor | None,
        num_beams: int,
        max_new_tokens: int,
    ):
        """Read B packed prompts of a LLaVA, and start K beams of each.

        features (P, D): those of all image positions in the prompts, None if there are none.
        """
        self.lm = model.language_model
        self.num_beams = num_beams
        self.prompts = len(packed.cu_seqlens) - 1

        # Beyond the switch of LongRoPE all keys of a sequence are others.
        switch = self.lm.config.rope_switch
        for length in packed.cu_seqlens.diff().tolist():
            if length <= switch < length + max_new_tokens - 1:
                what = f"{max_new_tokens} tokens behind {length} cross {switch}, beyond which"
                what += " the model rotates all keys differently"
                raise UserError("max_new_tokens", what, "use fewer, or num_beams 1")

        # Each prompt is computed once, in one row of the cache.
        x = model.embed(packed.input_ids, features)  # (T, D)
        slots = packed.max_seqlen + max_new_tokens
        self.cache = Cache(self.lm.config, self.prompts, slots, like=x)
        attend = self.cache.prefill(packed)
        hidden_states = self.lm.model(x, packed.positions, attend, packed.cu_seqlens)

        # In float32, because beam search adds up many log-probabilities.
        last = packed.cu_seqlens[1:].long() - 1
        self.logits = self.lm.lm_head(hidden_states[last]).float()  # (B, V)

        # Then the rows are copied: all beams of a prompt begin as the prompt.
        prompts = torch.arange(self.prompts, device=x.device)
        self.reorder(prompts.repeat_interleave(num_beams))

    def reorder(self, parents: Tensor):
        """Let sequence i continue what sequence parents[i] was."""
        self.cache.reorder(parents)
        self.logits = self.logits[parents]

    def step(self, tokens: Tensor):
        """Append a token (B K,) to each sequence and compute the next logits."""
        positions = self.cache.lengths
        x = self.lm.model.embed(tokens)  # (B K, D)
        attend = self.cache.step()
        hidden_states = self.lm.model(x, positions, attend)
        self.logits = self.lm.lm_head(hidden_states).float()


def beam_search(beams: Beams, max_new_tokens: int, eos_token_id: int | None) -> Tensor:
    """Return the best answer to each prompt, (B, new), padded with eos_token_id (or 0).

    As with Hugging Face's defaults, each step looks at the 2 K best continuations, the score of a
    finished answer is its sum of log-probabilities / its number of tokens, and a prompt is done
    when no open beam can still beat the worst of its K best finished answers.
    """
    device = beams.logits.device
    num_beams = beams.num_beams
    searches = [Search(num_beams) for _ in range(beams.prompts)]

    # The sum of log-probabilities of each beam. The beams of a prompt start equal, so at first
    # only one of them may branch.
    scores = torch.full((beams.prompts, num_beams), -1e9, device=device)
    scores[:, 0] = 0

    for length in range(1, max_new_tokens + 1):
        # Find the best continuations of every prompt, among all tokens of all its beams.
        log_probabilities = beams.logits.log_softmax(-1)  # (B K, V)
        vocabulary = log_probabilities.size(-1)
        log_probabilities = log_probabilities.view(beams.prompts, num_beams, vocabulary)
        continued = scores[:, :, None] + log_probabilities  # (B, K, V)
        # A vocabulary of one token has only K continuations.
        kept = min(2 * num_beams, num_beams * vocabulary)
        best = continued.flatten(1).topk(kept)  # values and indices (B, 2 K)
        best_scores = best.values.tolist()
        best_choices = best.indices.tolist()

        # Every prompt picks its K beams of the next step from them.
        parents = []
        tokens = []
        for b, search in enumerate(searches):
            going = search.advance(best_scores[b], best_choices[b], vocabulary, eos_token_id)
            new_scores = [candidate.score for candidate in going]
            scores[b] = torch.tensor(new_scores, device=device)
            for candidate in going:
                parents.append(b * num_beams + candidate.beam)
                tokens.append(candidate.token)

        # A prompt that is done goes on beside the others, but its answers stay as they are.
        all_done = all(search.done for search in searches)
        if all_done or length == max_new_tokens:
            break
        beams.reorder(torch.tensor(parents, device=device))
        beams.step(torch.tensor(tokens, device=device))

    answers = []
    for search, open_scores in zip(searches, scores.tolist(), strict=True):
        answer = search.best(open_scores)
        answers.append(torch.tensor(answer))

    padding = 0
    if eos_token_id is not None:
        padding = eos_token_id
    padded = pad_sequence(answers, batch_first=True, padding_value=padding)
    return padded.to(device)


@dataclass
class Candidate:
    """A beam that goes on: its score, the beam that it continues, and the token it appends."""

    score: float  # sum of log-probabilities
    beam: int
    token: int


@dataclass
class Answer:
    """A whole answer, with the score by which answers of different lengths are compared."""

    score: float  # sum of log-probabilities / number of tokens
    tokens: list[int]


def score_of(answer: Answer) -> float:
    """Return what answers are sorted by."""
    return answer.score


class Search:
    """The beams of one prompt, and its finished answers."""

    def __init__(self, num_beams: int):
        self.num_beams = num_beams
        self.open: list[list[int]] = [[] for _ in range(num_beams)]  # the tokens of each beam
        self.finished: list[Answer] = []  # at most K, the best first
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
            elif rank < self.num_beams and not self.done:
                # An end counts only if it is itself among the K best continuations.
                tokens = self.open[beam] + [token]
                self.finished.append(Answer(score / length, tokens))
            if len(going) == self.num_beams:
                break

        # Keep the K best answers. The sort is stable: of equal ones the earlier stays in front.
        self.finished.sort(key=score_of, reverse=True)
        self.finished = self.finished[: self.num_beams]

        # The search is done when even the best continuation does not score higher than the worst
        # of the K answers.
        if len(self.finished) == self.num_beams:
            worst = self.finished[-1].score
            if worst >= scores[0] / length:
                self.done = True

        # A list of its own for each beam: several may continue the same old one.
        new_open = []
        for candidate in going:
            tokens = self.open[candidate.beam] + [candidate.token]
            new_open.append(tokens)
        self.open = new_open
        return going

    def best(self, open_scores: list[float]) -> list[int]:
        """Return the tokens of the best answer. If the search is not done, open beams count too."""
        answers = list(self.finished)
        if not self.done:
            for score, tokens in zip(open_scores, self.open, strict=True):
                answers.append(Answer(score / len(tokens), tokens))
        return max(answers, key=score_of).tokens
