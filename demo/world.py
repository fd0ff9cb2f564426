"""The embedded demo world: small pictures of shapes with questions about them, as LLaVA files.

    python -m demo.world out/world                       # the demo's data set: 24,000 scenes
    python -m demo.world out/world --seed 1 --scenes 2000

scenes.py has what a scene is and which split it belongs to, questions.py what is asked about it.
This file writes them to OUT:

    images/{pretrain,finetune,val,benchmark}/*.png
    pretrain.json                  captions, from which a model learns to see
    finetune.json                  4 to 7 questions about each picture, with short answers
    relations.json                 how objects of these pictures stand to each other
    val.json  val_*.json           held-out rows of all three sorts, for the validation loss
    tokenizer/                     a byte-level BPE of 512 entries, trained on the rows above
    benchmark/existence_*.jsonl    yes or no, in the row format and with the negatives of POPE
    benchmark/attributes.jsonl     colour, shape, count, relation: answers of one word
    benchmark/unseen_*.jsonl       all kinds of questions about pictures of a look not trained on
    benchmark/text_only.json       the percentages that the best answer to the words alone reaches
    world.json                     seed and sizes; written last

The benchmark asks about compositions that occur in no training picture. It has every question text
equally often with each of its possible answers, so the words alone reach exactly the chance level.
A row keeps its objects under "scene". The same seed writes the same bytes.

The file in order: the benchmark, one row, the tokenizer, the whole folder, the command.
"""

import json
import os
import random
import shutil
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import command_line
from demo.questions import (
    Balance,
    Question,
    existence_text,
    interview,
    negatives,
    questions,
    read_places,
    relations,
)
from demo.scenes import (
    IMAGE_SIZE,
    PAIRS,
    POPULAR,
    TRAINED,
    UNSEEN,
    Look,
    Scene,
    draw_background,
    draw_scene,
    render,
)

SCENES = 24_000  # training scenes, half with captions and half with questions
VAL_SCENES = 300
EXISTENCE_QUESTIONS = 300  # per split
ATTRIBUTE_QUESTIONS = 150  # per kind
UNSEEN_QUESTIONS = 30  # per kind and look
ATTRIBUTES = ("colour", "shape", "count", "relation")
SPLITS = ("pretrain", "finetune", "val", "benchmark")

VOCAB_SIZE = 512
EOS = "<eos>"

Asked = tuple[Question, Scene]


@dataclass
class BenchmarkFile:
    """The questions of a file of the benchmark, and how its pictures look."""

    asked: list[Asked]
    look: Look = TRAINED


# ---------------------------------------------------------------------- the benchmark


class HeldOut:
    """Held-out scenes, by the questions about them. Each scene is asked about once.

    A scene is known by its number in the list.
    """

    def __init__(self, scenes: list[Scene]):
        self.scenes = scenes
        self.used = set()  # numbers of the scenes that a question was asked about
        self.where = defaultdict(list)  # (text, answer) -> [(number of the scene, Question)]
        self.texts = defaultdict(set)  # kind -> the question texts
        self.choices = {}  # text -> its possible answers

        for number, scene in enumerate(scenes):
            for question in questions(scene):
                text = question.text
                self.where[text, question.answer].append((number, question))
                self.texts[question.kind].add(text)
                self.choices[text] = question.choices

    def find(
        self, text: str, answer: str, kind_of_negatives: str | None
    ) -> tuple[int, Question] | None:
        """Return the first unused scene in which `answer` is right, and the question.

        Where that is "no", the object asked for is also one of that kind of negatives.
        """
        for number, question in self.where[text, answer]:
            if number in self.used:
                continue

            # What is absent may be so in several ways, and the caller asks for one of them.
            if answer == "no":
                absent = negatives(self.scenes[number])[kind_of_negatives]
                if text not in map(existence_text, absent):
                    continue
            return number, question
        return None

    def block(self, text: str, kind_of_negatives: str | None) -> list[Asked]:
        """Return the question once with each of its answers, and use those scenes up.

        The list is empty if an answer is left without a scene.
        """
        numbers = []
        asked = []
        for answer in self.choices[text]:
            found = self.find(text, answer, kind_of_negatives)
            if found is None:
                return []
            number, question = found
            numbers.append(number)
            asked.append((question, self.scenes[number]))

        # Only a block that is complete uses its scenes up. One scene is never found twice for it:
        # a text has one answer in a scene.
        self.used.update(numbers)
        return asked

    def ask(
        self,
        rng: random.Random,
        texts: Iterable[str],
        total: int,
        kind_of_negatives: str | None = None,
    ) -> list[Asked]:
        """Return at least `total` questions with these texts, in random order.

        It goes round the texts and adds a block of each. Answers stay balanced because a block is
        never cut.
        """
        # A set of texts has another order in each process. Sorted first, they shuffle alike.
        texts = sorted(texts)
        rng.shuffle(texts)

        asked = []
        while len(asked) < total:
            before = len(asked)
            for text in texts:
                if len(asked) < total:
                    asked += self.block(text, kind_of_negatives)
            if len(asked) == before:
                raise RuntimeError(f"too few held-out scenes for questions like {texts[0]!r}")

        rng.shuffle(asked)
        return asked


def make_benchmark(rng: random.Random, split: str) -> dict[str, BenchmarkFile]:
    """Return each benchmark file: its questions, and the scenes of `split` that they are about.

    Every text comes once with each of its possible answers, each time with another scene. Whoever
    answers from the words alone reaches exactly the chance level.
    """
    total = 3 * EXISTENCE_QUESTIONS + len(ATTRIBUTES) * ATTRIBUTE_QUESTIONS
    held_out = draw_held_out(rng, split, total, TRAINED)

    files = {}
    for name in ("random", "popular", "adversarial"):
        pairs = PAIRS
        if name == "popular":
            pairs = POPULAR  # others have no "no" that is popular, and a search for one takes long
        texts = map(existence_text, pairs)
        asked = held_out.ask(rng, texts, EXISTENCE_QUESTIONS, name)
        files[f"existence_{name}"] = BenchmarkFile(asked)

    asked = []
    for kind in ATTRIBUTES:
        asked += held_out.ask(rng, held_out.texts[kind], ATTRIBUTE_QUESTIONS)
    files["attributes"] = BenchmarkFile(asked)

    for name, look in UNSEEN.items():
        held_out = draw_held_out(rng, split, (1 + len(ATTRIBUTES)) * UNSEEN_QUESTIONS, look)
        asked = held_out.ask(rng, map(existence_text, PAIRS), UNSEEN_QUESTIONS, "random")
        for kind in ATTRIBUTES:
            asked += held_out.ask(rng, held_out.texts[kind], UNSEEN_QUESTIONS)
        files[f"unseen_{name}"] = BenchmarkFile(asked, look)
    return files


def draw_held_out(rng: random.Random, split: str, questions: int, look: Look) -> HeldOut:
    """Return random scenes of `split` that suffice for so many questions."""
    # More scenes than questions: each is used once, and not every scene has a rare answer.
    return HeldOut([draw_scene(rng, split, look=look) for _ in range(3 * questions)])


def text_only(files: dict[str, BenchmarkFile], balance: Balance) -> dict[str, float]:
    """Return the percentage of each file and kind that the words alone get right.

    `balance` has counted the answers of the training rows.
    """
    answered = Counter()
    right = Counter()
    for name, file in files.items():
        for question, _ in file.asked:
            # The kinds of the attributes have percentages of their own.
            groups = [name]
            if name == "attributes":
                groups.append(question.kind)

            is_right = question.answer == balance.majority(question)
            for group in groups:
                answered[group] += 1
                if is_right:
                    right[group] += 1

    percent = {}
    for group in sorted(answered):
        percent[group] = round(100 * right[group] / answered[group], 2)
    return percent


# ---------------------------------------------------------------------- rows


def make_conversation(turns: list[tuple[str, str]]) -> list[dict]:
    """Return (question, answer) pairs as LLaVA has them; the picture comes before the first."""
    conversation = []
    for i, (question, answer) in enumerate(turns):
        if i == 0:
            question = "<image>\n" + question
        conversation.append({"from": "human", "value": question})
        conversation.append({"from": "gpt", "value": answer})
    return conversation


def make_row(name: str, image: str, scene: Scene, turns: list[tuple[str, str]]) -> dict:
    """Return one LLaVA row; `turns` are (question, answer)."""
    return {
        "id": name,
        "image": image,
        "objects": len(scene),
        "conversations": make_conversation(turns),
        "scene": scene,
    }


def caption_row(name: str, image: str, scene: Scene) -> dict:
    """Return a row for pretraining."""
    return make_row(name, image, scene, [("What is where?", read_places(scene))])


def question_row(name: str, image: str, scene: Scene, rng: random.Random, balance: Balance) -> dict:
    """Return a row for finetuning."""
    turns = [(q.text, q.answer) for q in interview(scene, rng, balance)]
    return make_row(name, image, scene, turns)


def relation_rows(rows: list[dict], rng: random.Random, balance: Balance) -> list[dict]:
    """Return rows of questions about relations, one for each picture of `rows` that has some.

    `balance` counts the answers.
    """
    found = []
    for row in rows:
        asked = relations(row["scene"], rng, balance)
        if asked:
            turns = [(q.text, q.answer) for q in asked]
            found.append(make_row(f"{row['id']}-relations", row["image"], row["scene"], turns))
    return found


# ---------------------------------------------------------------------- files


def write_json(file: Path, value: dict):
    """Write a small file that people may read."""
    file.write_text(json.dumps(value, indent=2) + "\n")


def write_summary(file: Path, seed: int, scenes: int, image_size: int, counts: dict[str, int]):
    """Write what a data set was made from, and how many rows each of its files has."""
    summary = {"seed": seed, "scenes": scenes, "image_size": image_size, "rows": counts}
    write_json(file, summary)


def write_rows(file: Path, rows: list[dict]):
    """Write a JSON list with one row a line."""
    lines = [json.dumps(row) for row in rows]
    file.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def write_lines(file: Path, rows: list[dict]):
    """Write JSON lines."""
    lines = [json.dumps(row) for row in rows]
    file.write_text("\n".join(lines) + "\n")


def train_tokenizer(rows: list[dict], folder: Path):
    """Write a byte-level BPE in which the world's words are one token each.

    Bytes are its smallest tokens, so it gives any text back exactly.
    """
    # The words of the chat templates stand in the texts, so they become single tokens too.
    roles = {"human": "USER: ", "gpt": " ASSISTANT: "}
    texts = []
    for row in rows:
        text = ""
        for turn in row["conversations"]:
            text += roles[turn["from"]] + turn["value"]
        texts.append(text)

    # No prefix space: a text must come back as it was. The whole byte alphabet is there from the
    # start, because the rows have only a few of the bytes.
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)

    # The two files that transformers would write.
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    options = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", options)


def random_streams(seed: int) -> dict[str, random.Random]:
    """Return a stream of random numbers for each split, whose size then changes no other split.

    Relations have one of their own, because they are asked about pictures of two splits.
    """
    return {name: random.Random(f"{seed}/{name}") for name in (*SPLITS, "relations")}


class PictureWriter:
    """Writes pictures under `out`/images and, on a terminal, counts them there."""

    def __init__(self, out: Path):
        self.out = out
        self.done = 0
        self.started = time.monotonic()
        for split in SPLITS:
            (out / "images" / split).mkdir(parents=True)

    def save(
        self, split: str, number: int, scene: Scene, rng: random.Random, look: Look = TRAINED
    ) -> str:
        """Write the picture of a scene on a random background; return its name for a row."""
        name = f"{split}/{number:05d}.png"
        picture = render(scene, draw_background(rng, look))
        # Files are small at any level, and this one writes fastest.
        picture.save(self.out / "images" / name, compress_level=1)

        self.done += 1
        if self.done % 500 == 0:
            rate = self.done / self.seconds()
            self.show(f"{self.done:,} pictures, {rate:.0f}/s", end="")
        return name

    def seconds(self) -> float:
        """Return the time since the first picture could be written."""
        return time.monotonic() - self.started

    def show(self, text: str, end: str = "\n"):
        """Print over the last line, if this is a terminal."""
        if sys.stdout.isatty():
            print(f"\r{self.out.name}: {text}", end=end, flush=True)


def caption_rows(pictures: PictureWriter, rng: random.Random, count: int) -> list[dict]:
    """Return the rows of pretraining and write their pictures."""
    rows = []
    for i in range(count):
        scene = draw_scene(rng, "train")
        image = pictures.save("pretrain", i, scene, rng)
        rows.append(caption_row(f"pretrain-{i:05d}", image, scene))
    return rows


def question_rows(
    pictures: PictureWriter, rng: random.Random, count: int, balance: Balance
) -> list[dict]:
    """Return the rows of finetuning and write their pictures. `balance` counts the answers."""
    rows = []
    for i in range(count):
        scene = draw_scene(rng, "train")
        image = pictures.save("finetune", i, scene, rng)
        rows.append(question_row(f"finetune-{i:05d}", image, scene, rng, balance))
    return rows


def held_out_rows(pictures: PictureWriter, rng: random.Random) -> dict[str, list[dict]]:
    """Return the rows of the validation files, up to three about a picture; write the pictures."""
    balance = Balance()
    files = {"val": [], "val_pretrain": []}
    for i in range(VAL_SCENES):
        scene = draw_scene(rng, "val")
        image = pictures.save("val", i, scene, rng)
        files["val"].append(question_row(f"val-{i:05d}", image, scene, rng, balance))
        files["val_pretrain"].append(caption_row(f"val-pretrain-{i:05d}", image, scene))
    files["val_relations"] = relation_rows(files["val"], rng, balance)
    return files


def benchmark_rows(
    file: BenchmarkFile, first: int, pictures: PictureWriter, rng: random.Random
) -> list[dict]:
    """Return the rows of a benchmark file and write their pictures, numbered from `first` on."""
    rows = []
    for i, (question, scene) in enumerate(file.asked):
        row = {
            "question_id": i + 1,
            "image": pictures.save("benchmark", first + i, scene, rng, file.look),
            "text": question.text,
            "label": question.answer,
            "kind": question.kind,
            "choices": question.choices,
            "objects": len(scene),
            "scene": scene,
        }
        rows.append(row)
    return rows


def fill_folder(out: Path, seed: int, scenes: int, asks_about: str):
    """Write the whole data set into the folder `out`, which it makes.

    The benchmark is about the compositions of the split `asks_about`.
    """
    pictures = PictureWriter(out)
    streams = random_streams(seed)

    # The rows to train and to validate on.
    n_captions = scenes // 2
    trained_answers = Balance()
    captions = caption_rows(pictures, streams["pretrain"], n_captions)
    asked = question_rows(pictures, streams["finetune"], scenes - n_captions, trained_answers)
    files = {
        "pretrain": captions,
        "finetune": asked,
        "relations": relation_rows(captions + asked, streams["relations"], trained_answers),
        **held_out_rows(pictures, streams["val"]),
    }
    for name, rows in files.items():
        write_rows(out / f"{name}.json", rows)
    train_tokenizer(captions + asked + files["relations"], out / "tokenizer")
    counts = {name: len(rows) for name, rows in files.items()}

    # The benchmark. Its pictures have one numbering over all files.
    (out / "benchmark").mkdir()
    rng = streams["benchmark"]
    benchmark = make_benchmark(rng, asks_about)
    first = 0
    for name, file in benchmark.items():
        rows = benchmark_rows(file, first, pictures, rng)
        write_lines(out / "benchmark" / f"{name}.jsonl", rows)
        counts[name] = len(rows)
        first += len(rows)
    write_json(out / "benchmark" / "text_only.json", text_only(benchmark, trained_answers))

    # The summary comes last: a folder that has it is complete.
    write_summary(out / "world.json", seed, scenes, IMAGE_SIZE, counts)
    pictures.show(f"{pictures.done:,} pictures in {pictures.seconds():.0f} s")


# ---------------------------------------------------------------------- the command

Fill = Callable[[Path, int, int, str], None]  # writes (folder, seed, scenes, asks_about)


def write(
    out: str | Path,
    seed: int = 0,
    scenes: int = SCENES,
    fill: Fill = fill_folder,
    asks_about: str = "benchmark",
):
    """Write a data set to the new folder `out` with `fill`.

    Nothing is left there if it does not finish. Raises FileExistsError if `out` exists.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out}: exists already; fix: remove it or name another folder")

    # Fill a folder beside it and rename that: whoever sees `out` sees all of it.
    temporary = out.with_name(f"{out.name}.tmp{os.getpid()}")
    try:
        fill(temporary, seed, scenes, asks_about)
        # The pictures are not fsynced: after a power cut the same seed makes them again.
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main(doc: str = __doc__, scenes: int = SCENES, fill: Fill = fill_folder):
    """Run the command of this file, and of moving.py, whose `fill` writes clips."""
    parser = command_line.parser(doc)
    parser.add_argument("out", metavar="OUT", help="new folder to write")
    parser.add_argument(
        "--seed",
        type=command_line.within(int, 0, 2**63 - 1),
        default=0,
        help="another seed, another data set (default 0)",
    )
    parser.add_argument(
        "--scenes",
        type=command_line.within(int, 1, 10**7),
        default=scenes,
        help=f"how many to train on (default {scenes})",
    )
    parser.add_argument(
        "--asks-about",
        choices=("benchmark", "val"),
        default="benchmark",
        help="the split that OUT/benchmark is about: val to choose a recipe by (default benchmark)",
    )

    def command(argv: list[str]):
        args = parser.parse_args(argv)
        write(args.out, args.seed, args.scenes, fill, args.asks_about)

    command_line.cli(command, doc)


if __name__ == "__main__":
    main()
