"""One's own rows as a test: every question in them that has a true answer.

    examples = read_questions(open_rows("mine.jsonl"), spec)  # spec: the model's SampleSpec
    scale = choose_scale(examples)                            # Scale("exact", "the true ...", ...)
    scale.score(examples, answers)   # {"score": 81.3, "interval": [74.1, 86.8], "chance": 33.5 ...}

A question is a human turn with an answer behind it. The turns before it stand before it as the row
has them, with the true answers; an answer before the first question is left out, as training does.
If the row has a list "answers", all of them are right.

What is printed of the answers, in percent:

    score      what they earn on average (metrics.py), and its 95 % interval (intervals.py)
    chance     what the best constant answer earns: the same one to all questions
    text only  what the words of a question give away: it gets the answer that is right most often
               where the same words are asked, of two pictures at least. Words that are asked of one
               picture only are taken together with all that begin with the same three words, or
               with the same one, or else with all such questions.
    loss       the mean over the supervised tokens of the rows, as training logs it

Chance and text only need answers that form a set, so that the same ones are true again and again.
own_rows_report.py makes lines, a table and a page of all that.

From top to bottom: questions; the scale on which answers are scored; its controls; the loss.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from config import Stage, UserError, printable
from evals import Example
from evals.intervals import Difference, difference, interval
from evals.kept import Ranks
from evals.metrics import METRICS, Metric, choose, form_a_set, is_number, is_yes_or_no, plain
from evals.scores import best_constant
from inputs.conversation import IMAGE
from inputs.media import Media
from inputs.rows import Rows
from inputs.sample import SampleSpec, check_image_count, encode_text, make_samples
from inputs.turns import answers_of
from model import LLaVA
from packing import Item, bin_pack, pack_samples

# Text only: words that are asked of one picture are compared by so many of their first instead.
FIRST_WORDS = (3, 1, 0)

# Room for the answer: so many times the tokens of the longest true one.
ROOM = 2
LEAST_ROOM = 16
MOST_ROOM = 1024


# ------------------------------------------------------------------------------------- questions


class RowPictures(Sequence):
    """The pictures or videos of a row, read when they are asked for: not all fit in memory."""

    def __init__(self, rows: Rows, i: int, count: int):
        self.rows = rows
        self.i = i
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, k: int) -> Path | bytes:
        if not 0 <= k < self.count:
            raise IndexError(k)
        return self.rows.media(self.i, self.rows[self.i])[k].source


def read_questions(rows: Rows, spec: SampleSpec) -> list[Example]:
    """Return the questions of all rows in their order. Own key: "row", its number.

    "label" is the list of true answers. "group" is the same for all questions about the same
    pictures. Raise UserError for the first row that training would not take either, and for rows
    without a question.
    """
    found = []
    for i in range(len(rows)):
        found += questions_of_row(rows, i, spec)
    if not found:
        fix = "write an answer behind each question"
        raise UserError(rows.file, "no question with an answer in it", fix)
    return found


def questions_of_row(rows: Rows, i: int, spec: SampleSpec) -> list[Example]:
    """Return the questions of row i. Raise UserError that names it."""
    row = rows[i]
    where = rows.where(i, row)
    media = rows.media(i, row)

    # What training asks of a row: turns that alternate, a mark for each picture.
    ids, _ = encode_text(row, where, spec)[-1]
    check_image_count(ids, media, where)

    asked = asked_turns(row["conversations"])
    others = other_answers(row, where, len(asked))

    examples = []
    for k, (conversation, answer) in enumerate(asked):
        name = f"{i:06d}"
        if len(asked) > 1:
            name += f".{k}"
        example = {
            "id": name,
            "row": i,
            "where": where,
            "prompt": as_text(conversation),
            "conversation": conversation,
            "label": list(dict.fromkeys([answer, *others])),
            "image": None,
            "group": group_of(media, i),
        }

        # Pictures of later turns are not seen yet.
        seen = media[: count_marks(conversation)]
        if seen:
            names = [one.name for one in seen]
            example[seen[0].kind] = names[0] if len(names) == 1 else names
            example["pictures"] = [one.source for one in seen]
            if any(isinstance(one.source, bytes) for one in seen):
                example["pictures"] = RowPictures(rows, i, len(seen))
        examples.append(example)
    return examples


def asked_turns(turns: list[dict]) -> list[tuple[list[dict], str]]:
    """Return (the turns up to a question, its answer) for each question of a conversation."""
    given = []
    asked = []
    for turn in turns:
        if turn["from"] == "gpt":
            if not given or given[-1]["from"] != "human":
                continue  # nobody has asked
            answer = turn["value"].strip()
            if answer:
                asked.append((list(given), answer))
        given.append(turn)
    return asked


def other_answers(row: dict, where: str, questions: int) -> list[str]:
    """Return the list "answers" of a row with so many questions; an empty one if it has none."""
    if not isinstance(row.get("answers"), list) or not row["answers"]:
        return []
    if questions > 1:
        what = f'"answers" beside {questions} questions: whose they are is not known'
        raise UserError(where, what, "make rows of one question each")
    answers = [one.strip() for one in answers_of(row["answers"], f"{where}: answers")]
    return [one for one in answers if one]


def count_marks(conversation: list[dict]) -> int:
    """Return how many <image> stand in turns for a picture; in an answer it is a text."""
    return sum(turn["value"].count(IMAGE) for turn in conversation if turn["from"] != "gpt")


def as_text(conversation: list[dict]) -> str:
    """Return a question as one text, with the turns before it if there are any."""
    if len(conversation) == 1:
        return conversation[0]["value"]
    return "\n".join(f"{turn['from']}: {turn['value']}" for turn in conversation)


def group_of(media: list[Media], i: int) -> tuple:
    """Return the same for all rows with the same pictures or videos; row i without any is alone.

    It is the hash of a picture in the row, or else the path of its file.
    """
    if not media:
        return (i,)
    found = []
    for one in media:
        if isinstance(one.source, bytes):
            found.append(hashlib.blake2b(one.source, digest_size=16).hexdigest())
        else:
            found.append(str(one.source))
    return tuple(found)


def room_for_answers(examples: list[Example], tokenizer) -> int:
    """Return how many tokens an answer may have: a power of two, by the longest true one.

    A few rows more then seldom change it, and with it whether older answers count.
    """
    longest = 0
    for truth in {truth for example in examples for truth in example["label"]}:
        longest = max(longest, len(tokenizer.encode(truth)[0]))
    room = LEAST_ROOM
    while room < min(ROOM * longest, MOST_ROOM):
        room *= 2
    return room


# ---------------------------------------------------------------------------------------- scores


@dataclass
class Scale:
    """The metric for some questions, and what it gives without a look at the pictures."""

    name: str
    reason: str  # why this one
    metric: Metric
    controls: dict[str, float]  # "chance" and "text_only", percent, where answers form a set
    constant: str = ""  # the best constant answer

    def credits(self, examples: list[Example], answers: list[str]) -> list[float]:
        """Return what each answer earns, 0 to 1."""
        credits = []
        for example, answer in zip(examples, answers, strict=True):
            credits.append(self.metric.credit(answer, example["label"]))
        return credits

    def score(self, examples: list[Example], answers: list[str]) -> dict:
        """Return the score of answers with its interval, in percent, beside the controls."""
        credits = self.credits(examples, answers)
        low, high = interval(credits, groups(examples))
        return {
            "score": 100 * sum(credits) / len(credits),
            "interval": [100 * low, 100 * high],
            **self.controls,
            "n": len(credits),
        }

    def compare(self, examples: list[Example], answers: list[str], others: list[str]) -> Difference:
        """Return how much more some answers earn than others to the same questions, 0 to 1."""
        mine = self.credits(examples, answers)
        theirs = self.credits(examples, others)
        return difference(mine, theirs, groups(examples))


def groups(examples: list[Example]) -> list:
    """Return what each question belongs to: its pictures."""
    return [example["group"] for example in examples]


def choose_scale(examples: list[Example], metric: str = "") -> Scale:
    """Return the scale for some questions: with this metric, or with what fits their answers.

    Raise UserError for a metric that cannot compare with a true answer of theirs.
    """
    truths = [example["label"] for example in examples]
    reason = "--metric says so"
    if not metric:
        metric, reason = choose(truths)

    if metric == "yesno":
        check_truths(examples, is_yes_or_no, metric)
    if metric == "number":
        check_truths(examples, is_number, metric)

    scale = Scale(metric, reason, METRICS[metric], {})
    if form_a_set(truths):
        add_controls(scale, examples)
    return scale


def check_truths(examples: list[Example], can_be_true: Callable[[str], bool], metric: str):
    """Raise UserError for a true answer that a metric cannot read."""
    for example in examples:
        for truth in example["label"]:
            if not can_be_true(truth):
                what = f"the true answer {printable(truth, 60)!r} is none for {metric}"
                raise UserError(example["where"], what, "--metric: exact, contains, f1 or anls")


# -------------------------------------------------------------------------------------- controls


def add_controls(scale: Scale, examples: list[Example]):
    """Put into a scale what answers earn that do not depend on the pictures."""
    different = {}
    for example in examples:
        different |= dict.fromkeys(plain(truth) for truth in example["label"])

    # What each of them would earn for each question; many questions have the same true answers.
    known = {}
    credits = []
    for example in examples:
        truths = tuple(example["label"])
        if truths not in known:
            earned = {one: scale.metric.credit(one, truths) for one in different}
            known[truths] = {one: credit for one, credit in earned.items() if credit > 0}
        credits.append(known[truths])

    scale.constant, credit = best_constant(credits)
    scale.controls["chance"] = 100 * credit
    if len(set(groups(examples))) > 1:
        scale.controls["text_only"] = 100 * text_only(examples, credits)


def text_only(examples: list[Example], credits: list[dict[str, float]]) -> float:
    """Return what the best answer to each question's words earns, 0 to 1, as said at the top.

    credits: for each question {answer: its credit}.
    """
    total = 0.0
    left = range(len(examples))
    for words in (None, *FIRST_WORDS):  # None: by all of them
        # The questions that begin with the same words.
        alike = {}
        for k in left:
            key = tuple(asked_words(examples[k])[:words])
            alike.setdefault(key, []).append(k)

        # Those whose answer no other picture has go on, to be compared by fewer words.
        left = []
        for asked in alike.values():
            best = best_seen_twice(examples, credits, asked)
            if best is None:
                left += asked
            else:
                total += best
    return total / len(examples)


def asked_words(example: Example) -> list[str]:
    """Return the words of a question, without those of the turns before it."""
    return example["conversation"][-1]["value"].replace(IMAGE, "").split()


def best_seen_twice(
    examples: list[Example], credits: list[dict[str, float]], asked: list[int]
) -> float | None:
    """Return the total that the best single answer to the questions `asked` earns.

    It is one that is right for at least two pictures. None if there is none.
    """
    totals = {}
    pictures = {}
    for k in asked:
        for answer, credit in credits[k].items():
            totals[answer] = totals.get(answer, 0.0) + credit
            pictures.setdefault(answer, set()).add(examples[k]["group"])
    seen = [totals[answer] for answer in totals if len(pictures[answer]) > 1]
    return max(seen, default=None)


# ------------------------------------------------------------------------------------------ loss


def mean_loss(
    model: LLaVA,
    rows: Rows,
    examples: list[Example],
    spec: SampleSpec,
    change: Callable[[Item], Item] | None,
    ranks: Ranks,
) -> float:
    """Return the mean loss over the supervised tokens of the rows that the examples are of.

    change: returns what is shown in place of an item. Every rank takes a part of the rows.
    """
    numbers = list(dict.fromkeys(example["row"] for example in examples))
    mine = numbers[ranks.rank :: ranks.size]
    total = torch.tensor(sum_of_losses(model, rows, mine, spec, change)).double()
    if ranks.size > 1:
        dist.all_reduce(total)
    loss, supervised = total.tolist()
    return loss / supervised


@torch.no_grad()
def sum_of_losses(
    model: LLaVA,
    rows: Rows,
    numbers: Sequence[int],
    spec: SampleSpec,
    change: Callable[[Item], Item] | None,
) -> tuple[float, int]:
    """Return the sum of the token losses of the rows of these numbers, and of how many tokens.

    That is what training's validation makes a mean of, packed as it does it. Raise UserError for a
    row that training would not take.
    """
    stage = Stage()
    device = model.language_model.lm_head.weight.device
    loss = 0.0
    supervised = 0
    for begin in range(0, len(numbers), stage.global_batch):
        samples = []
        for i in numbers[begin : begin + stage.global_batch]:
            for sample in make_samples(rows, i, spec):
                if change:
                    sample.items = [change(item) for item in sample.items]
                samples.append(sample)
        lengths = [len(sample.ids) for sample in samples]
        for places in bin_pack(lengths, stage.micro_batch_tokens):
            batch = pack_samples([samples[place] for place in places])
            loss += model.loss(batch.to(device)).item()
            supervised += batch.supervised
    return loss, supervised
