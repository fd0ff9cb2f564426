"""One mixture of rows in all containers: the same samples on any ranks, and after a kill."""

import csv
import io
import json
import os
import signal
import tarfile
import tomllib

import pytest

from checkpoints import seal
from config import Source, Stage
from data import Steps
from inputs.content import row_keys
from inputs.holdout import open_stage
from tests.tools.forked_runs import launch, losses, said
from tests.tools.stopped_runs import die_in_step
from tests.tools.training_runs import RECIPE

pytest.importorskip("pyarrow")

STAGE = """
[stage.finetune]
template = "plain"
tune = {{ llm = "full", vision = "frozen" }}
steps = 8
global_batch = 16
validation = 0.1
[stage.finetune.mixture.json]
data = "{rows}/rows.json"
images = "{world}/images"
weight = 1.5
[stage.finetune.mixture.lines]
data = "{rows}/rows.jsonl"
images = "{world}/images"
[stage.finetune.mixture.parquet]
data = "{rows}/*.parquet"
weight = 0.7
at_least = {{ rating = 3 }}
[stage.finetune.mixture.table]
data = "{rows}/rows.csv"
images = "{world}/images"
columns = {{ image = "photo", question = "asked", answer = "said" }}
[stage.finetune.mixture.tar]
data = "{rows}/rows.tar"
weight = 0.5
[stage.finetune.mixture.folder]
data = "{rows}/folder"
"""
SOURCES = tuple(
    tomllib.loads(STAGE.replace("{{", "{").replace("}}", "}"))["stage"]["finetune"]["mixture"]
)
COUNT = 20  # rows of a source


@pytest.fixture(scope="session")
def mixed(tiny_world, tmp_path_factory):
    """Return a recipe of a mixture of the demo's questions in six containers.

    Beside each, the same rows lie as NAME.llava.json, those of the parquet files with their rating.
    """
    folder = tmp_path_factory.mktemp("mixed")
    table = json.loads((tiny_world / "finetune.json").read_text())
    for k, name in enumerate(SOURCES):
        rows = []
        for row in table[k * COUNT : (k + 1) * COUNT]:
            turns = row["conversations"][:2]
            made = {"id": row["id"], "conversations": turns, "rating": len(rows) % 5}
            if "image" in row:
                made["image"] = row["image"]
            rows.append(made)
        write_source(name, folder, tiny_world / "images", rows)
        (folder / f"{name}.llava.json").write_text(json.dumps(rows))

    head, _, _ = RECIPE.partition("[stage.pretrain]")
    recipe = folder / "mixed.toml"
    recipe.write_text((head + STAGE).format(world=tiny_world, rows=folder, out=folder / "out"))
    return recipe


def write_source(name, folder, images, rows):
    """Write LLaVA rows in one of the containers."""
    from pyarrow import Table, parquet

    if name == "json":
        (folder / "rows.json").write_text(json.dumps(rows))
        return
    if name == "lines":
        lines = []
        for row in rows:
            said = [
                {"role": role, "content": turn["value"]}
                for role, turn in zip(("user", "assistant"), row["conversations"], strict=True)
            ]
            pictures = [row["image"]] if "image" in row else []
            lines.append({"id": row["id"], "messages": said, "images": pictures})
        (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return

    asked = []
    for row in rows:
        question, answer = (turn["value"] for turn in row["conversations"])
        question = question.removeprefix("<image>\n")
        asked.append((row["id"], row.get("image"), question, answer, row["rating"]))
    if name == "table":
        with open(folder / "rows.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("id", "photo", "asked", "said"))
            writer.writerows(line[:4] for line in asked)
        return

    contents = [line[1] and (images / line[1]).read_bytes() for line in asked]
    if name == "parquet":
        made = []
        for (key, _, question, answer, rating), content in zip(asked, contents, strict=True):
            picture = content and {"bytes": content, "path": None}
            pair = {"user": question, "assistant": answer}
            made.append({"id": key, "images": [picture], "texts": [pair], "rating": rating})
        for k in range(2):
            part = Table.from_pylist(made[k * COUNT // 2 : (k + 1) * COUNT // 2])
            parquet.write_table(part, folder / f"{k}.parquet", row_group_size=3)
    elif name == "tar":
        with tarfile.open(folder / "rows.tar", "w") as tar:
            for (key, _, question, answer, _), content in zip(asked, contents, strict=True):
                text = json.dumps({"id": key, "question": question, "answer": answer}).encode()
                members = [("png", content), ("json", text)]
                for ending, member in members if content else members[1:]:
                    info = tarfile.TarInfo(f"{key}.{ending}")
                    info.size = len(member)
                    tar.addfile(info, io.BytesIO(member))
    else:
        (folder / "folder").mkdir()
        lines = []
        for (key, picture, question, answer, _), content in zip(asked, contents, strict=True):
            line = {"id": key, "question": question, "answer": answer}
            if content:
                line["file_name"] = os.path.basename(picture)
                (folder / "folder" / line["file_name"]).write_bytes(content)
            lines.append(line)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "folder/metadata.jsonl").write_text(text)


def sources_of(recipe) -> dict[str, Source]:
    """Return the sources of the recipe's mixture."""
    mixture = tomllib.loads(recipe.read_text())["stage"]["finetune"]["mixture"]
    return {name: Source(**values) for name, values in mixture.items()}


def all_of(rows) -> dict[int, list]:
    """Return the keys of content and the id of all rows, in the order of their ids."""
    keys = row_keys(rows).tolist()
    return sorted([rows[i]["id"], *keys[i]] for i in range(len(rows)))


@pytest.mark.parametrize("validation", [0.1, 7])
def test_the_same_rows_are_chosen_and_held_out_in_any_container(mixed, tiny_world, validation):
    sources = sources_of(mixed)
    found = open_stage(Stage(mixture=sources, validation=validation), "stage")
    plain = {}
    for name, source in sources.items():
        file = str(mixed.parent / f"{name}.llava.json")
        images = str(tiny_world / "images")
        plain[name] = Source(file, images, weight=source.weight, at_least=source.at_least)
    wanted = open_stage(Stage(mixture=plain, validation=validation), "stage")
    assert found.notes == wanted.notes and "parquet at_least: 8 of 20 rows" in found.notes
    assert all_of(found.held_out) == all_of(wanted.held_out)
    assert all_of(found.training) == all_of(wanted.training)


def watch(out, dies_in: int = 0):
    """Return what a rank does first: write the ids of its samples, and die in a step."""

    def begin(rank):
        real = Steps.__getitem__

        def make(steps, i):
            step = real(steps, i)
            ids = [steps.rows[row]["id"] for batch in step.batches for row in batch.rows]
            kind = "validation" if steps.validation else "training"
            with open(f"{out}.{rank}.ids", "a") as file:
                file.write(json.dumps([kind, i, ids, step.skipped]) + "\n")
            return step

        Steps.__getitem__ = make
        if dies_in:
            die_in_step(dies_in)

    return begin


def samples(out, ranks: int) -> dict[tuple, list[str]]:
    """Return the ids of the samples of each step, of all ranks and starts of a run."""
    made = {}
    for rank in range(ranks):
        of_rank = {}
        with open(f"{out}.{rank}.ids") as file:
            for kind, i, ids, skipped in map(json.loads, file):
                assert not skipped
                assert of_rank.setdefault((kind, i), ids) == ids  # made again after a kill
        for step, ids in of_rank.items():
            made.setdefault(step, []).extend(ids)
    return {step: sorted(ids) for step, ids in made.items()}


def train(recipe, out, ranks: int, dies_in: int = 0) -> bytes:
    """Train in a folder, also after a kill; return the weights."""
    options = ("train.save_every=2",)
    if dies_in:
        codes = launch(str(recipe), out, ranks, options, watch(out, dies_in))
        assert -signal.SIGKILL in codes, said(out)
        with seal.alone(out / "checkpoints"):
            assert seal.listed(out / "checkpoints")
    codes = launch(str(recipe), out, ranks, options, watch(out))
    assert codes == [0] * ranks, said(out)
    return (out / "model.safetensors").read_bytes()


def test_killed_and_resumed_a_mixture_of_containers_ends_with_the_same_bits(mixed, tmp_path):
    want = train(mixed, tmp_path / "whole", 1)
    assert train(mixed, tmp_path / "killed", 1, dies_in=6) == want
    whole = samples(tmp_path / "whole", 1)
    assert samples(tmp_path / "killed", 1) == whole
    assert len(whole["training", 7]) == 16
    assert len({name for step, ids in whole.items() for name in ids}) > 80


@pytest.mark.full
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_mixture_of_containers_is_the_same_on_ranks_that_are_killed(mixed, tmp_path, ranks):
    train(mixed, tmp_path / "one", 1)
    want = train(mixed, tmp_path / "whole", ranks)
    assert train(mixed, tmp_path / "killed", ranks, dies_in=6) == want
    one = samples(tmp_path / "one", 1)
    assert samples(tmp_path / "whole", ranks) == samples(tmp_path / "killed", ranks) == one
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
