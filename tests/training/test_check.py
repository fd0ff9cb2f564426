"""check.py: `data.py check` and `data.py inspect`."""

import dataclasses
import json
import os
import sys

import pytest
import tokenizers
from PIL import Image

import data
from config import UserError
from data import Order, make_spec
from inputs import tiling
from inputs.image_processor import ImageProcessor, NaFlexProcessor
from inputs.rows import open_rows
from inputs.sample import SampleSpec
from inputs.templates import byte_tokenizer
from inputs.tiling import MODES, Tiling
from packing import IGNORE, pack_samples
from tests.tools.environment import run, shared
from tests.tools.sample_rows import BAD, MeanColour, make_sample, mean_colour_spec, row, write
from training.check import check_rows


@pytest.fixture(scope="module")
def spec():
    return mean_colour_spec()


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (8, 8), (10, 20, 30)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8), (40, 50, 60)).save(tmp_path / "b.png")
    return tmp_path


def run_check(capsys, *argv):
    """(printed lines, the final error or None)"""
    try:
        data.main(["check", *map(str, argv)])
        error = None
    except UserError as e:
        error = str(e)
    return capsys.readouterr().out.splitlines(), error


def test_check_names_every_bad_row_and_counts_the_rest(folder, capsys):
    good = [
        row("g1"),
        row("g2", "<image><image>", image=["a.png", "b.png"]),
        row("g3", "Hi", image=None),
        row("g4"),
    ]
    rows = write(folder, [bad for bad, _ in BAD.values()] + good)
    lines, error = run_check(capsys, "--data", rows.file, "--image-tokens", 7)
    for i, (_, what) in enumerate(BAD.values()):
        (line,) = [
            line
            for line in lines
            if line.startswith((f"{rows.file}:row {i} ", f"{rows.file}:row {i}:"))
        ]
        assert what in line and "; fix: " in line
    n = len(BAD)
    assert (
        error == f"{rows.file}: {n} of {n + 4} rows are bad; "
        "fix: mend or remove them, or set train.on_bad_row=skip"
    )
    good = "1 text-only, 2 with one image or video, 1 with several"
    assert f"{rows.file}: {n + 4} rows, {n} bad; the good ones: {good}" in lines
    assert (
        any("█" in line for line in lines)
        and "  over-long: 0 rows lose 0 tokens of their tails" in lines
    )


def test_check_takes_the_tokenizer_and_the_lengths_of_training(folder, capsys):
    tokenizer = byte_tokenizer()
    tokenizer.save(folder / "tok")
    rows = write(
        folder, [row("x"), row("long", answer="y" * 300), row("z", "a" * 300 + "<image>"), row("w")]
    )
    args = [
        "--data",
        rows.file,
        "--tokenizer",
        folder / "tok",
        "--template",
        "plain",
        "--image-tokens",
        5,
    ]
    lines, error = run_check(capsys, *args, "--max-tokens", 100)
    spec = SampleSpec(tokenizer, "plain", 10**6, Tiling(5, processor=MeanColour()))
    length = [len(make_sample(rows, i, spec).ids) for i in range(4)]
    (note,) = [line for line in lines if "note: " in line]
    assert (
        f"row 1 (id long): note: over-long, loses {length[1] - 100} tokens" in note
        and "; fix: " in note
    )
    assert (
        f"  over-long: 2 rows lose {length[1] + length[2] - 200} tokens of their tails" not in lines
    )
    assert f"  tokens: {length[0]} shortest, " in "\n".join(
        lines
    ) and f"{length[1]} longest" in "\n".join(lines)
    assert "row 2 (id z)" in "\n".join(lines) and error and "1 of 4" in error
    lines, error = run_check(capsys, *args, "--max-tokens", 1000)
    targets = [int((make_sample(rows, i, spec).labels != IGNORE).sum()) for i in range(4)]
    assert (
        error is None
        and f"  supervised: {100 * sum(targets) / sum(length):.1f} % of {sum(length)} tokens"
        in lines
    )


def test_check_of_a_recipe_reads_every_stage(folder, capsys):
    byte_tokenizer().save(folder / "tok")
    write(folder, [row("x")], "one.json")
    write(folder, [row("y"), row("z", image="none.png")], "two.json")
    recipe = folder / "r.toml"
    recipe.write_text(
        f'model.tokenizer = "{folder}/tok"\nmodel.feature_select = "cls_patch"\n'
        'model.llm_config = {model_type = "llama"}\n'
        'model.vision_config = {model_type = "siglip_vision_model", image_size = 24, '
        "patch_size = 8}\n"
        f'[stage.a]\ndata = "{folder}/one.json"\n'
        f'[stage.b]\ntemplate = "phi"\ndata = "{folder}/one.json"\n'
        f'validation = "{folder}/two.json"\n'
    )
    lines, error = run_check(capsys, recipe)
    assert [line for line in lines if line[:3] == "== "] == [
        "== stage a",
        "== stage b",
        "== stage b, validation",
    ]
    assert (
        error
        == f"{recipe}: 1 of 4 rows are bad; fix: mend or remove them, or set train.on_bad_row=skip"
    )
    assert sum("9 per image" in line for line in lines) == 3
    lines, error = run_check(
        capsys, recipe, f"stage.b.validation={folder}/one.json", "stage.a.max_tokens=14"
    )
    assert error is None and sum("note: over-long, loses 2 tokens" in line for line in lines) == 1
    for override, what in (
        ("stage.a.data=", f"{recipe}:stage.a.data: not set; fix: "),
        ("stage.b.data=none.json", "none.json: no such file or directory; fix: "),
        ("stage.b.template=nope", "template: 'nope' is unknown"),
        ("model.tokenizer=", "model.tokenizer: not set; fix: "),
        ("model.tokenizer=none", "no such folder; fix: "),
    ):
        lines, error = run_check(capsys, recipe, override)
        assert what in error and not lines


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(folder, capsys):
    """On a GPU such an id would end the process at some later operation, without its name."""
    byte_tokenizer().save(folder / "tok")
    largest = 256  # 256 bytes and an eos
    write(folder, [row("x")], "rows.json")
    recipe = folder / "r.toml"

    def said(vocabulary):
        """Return the error of `check` with a model of so many ids, or None."""
        recipe.write_text(
            f'model.tokenizer = "{folder}/tok"\nmodel.feature_select = "cls_patch"\n'
            f'model.llm_config = {{model_type = "llama", vocab_size = {vocabulary}}}\n'
            'model.vision_config = {model_type = "siglip_vision_model", image_size = 24, '
            "patch_size = 8}\n"
            f'[stage.a]\ntemplate = "plain"\ndata = "{folder}/rows.json"\n'
        )
        return run_check(capsys, recipe)[1]

    fits = said(largest + 1), said(2 * largest)
    assert fits == (None, None)
    what = f"tok: makes ids up to {largest}, and the model has {largest}; fix: give the tokenizer"
    assert what in said(largest)

    # A control token that no template writes cannot be in a row, however often it is typed.
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tok/tokenizer.json"))
    tokenizer.add_special_tokens(["<unused>"])
    tokenizer.save(str(folder / "tok/tokenizer.json"))
    assert said(largest + 1) is None

    # One that ends each answer is in all of them.
    settings = {"eos_token": "<unused>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tok/tokenizer_config.json").write_text(json.dumps(settings))
    added = tokenizer.token_to_id("<unused>")
    assert f"makes ids up to {added}, and the model has {added}; fix" in said(added)
    assert said(added + 1) is None


def test_inspect_shows_the_first_samples_of_training(folder, capsys):
    byte_tokenizer().save(folder / "tok")
    write(folder, [row(f"{i} <b>[[x]]") for i in range(5)], "rows.json")
    recipe, page = folder / "r.toml", folder / "page.html"
    recipe.write_text(
        f'model.tokenizer = "{folder}/tok"\nmodel.feature_select = "cls_patch"\ntrain.seed = 3\n'
        'model.llm_config = {model_type = "llama"}\n'
        'model.vision_config = {model_type = "siglip_vision_model", image_size = 24, '
        "patch_size = 8}\n"
        f'[stage.a]\ndata = "{folder}/rows.json"\ntemplate = "phi"\n'
    )
    data.main(["inspect", str(recipe), "--rows", "2", "--page", str(page)])
    lines, order = capsys.readouterr().out.splitlines(), Order(5, 3)
    shown = [line for line in lines if line.startswith("--- ")]
    assert [line.split("row ")[1][0] for line in shown] == [str(order(k)[1]) for k in (0, 1)]
    assert all("views: 1 of 24 x 24" in line for line in shown)
    html, first = page.read_text(), order(0)[1]
    assert (
        html.count('<img src="data:image/png;base64,') == 2 and html.count("<mark>") == 2 + 1
    )  # and the legend
    assert f"{first} &lt;b&gt;[[x]]" in html and chr(27) not in html


def test_inspect_without_a_recipe_shows_the_text_of_rows(folder, capsys, monkeypatch):
    """Rows in the order of the file, or one of them; pictures only for a page."""
    byte_tokenizer().save(folder / "tok")
    rows = write(folder, [row(i, image="none.png" if i == 1 else "a.png") for i in range(7)])
    given = ["inspect", "--data", str(rows.file), "--tokenizer", str(folder / "tok")]
    options = [*given, "--image-tokens", "5"]

    data.main(options)
    lines = capsys.readouterr().out.splitlines()
    shown = [line for line in lines if line.startswith("--- ")]
    assert [line.split("row ")[1][0] for line in shown] == ["0", "1", "2"]
    assert lines[-1].startswith("=== 3 rows: ") and "[[ A dog.<|endoftext|>]]" in lines[3]

    data.main([*options, "--row", "4"])
    out = capsys.readouterr().out
    sample = make_sample(rows, 4, make_spec(str(folder / "tok"), "phi", 10**6, Tiling(5)), False)
    supervised = int((sample.labels != IGNORE).sum())
    tokens = f"{len(sample.ids)} tokens, {supervised} supervised"
    assert f"row 4 (id 4): {tokens}, views: 1\n" in out and f"=== 1 rows: {tokens}\n" in out

    page = folder / "page.html"
    data.main([*options, "--row", "4", "--page", str(page)])
    assert "views: 1 of 336 x 336" in capsys.readouterr().out
    assert page.read_text().count('<img src="data:image/png;base64,') == 1
    with pytest.raises(UserError, match="row 1 .*none.png: no such file or directory; fix: "):
        data.main([*options, "--row", "1", "--page", str(page)])
    with pytest.raises(UserError, match="no row 7, only 7 rows; fix: a --row from 0 to 6"):
        data.main([*options, "--row", "7"])

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for no_colour, colour in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", no_colour)
        data.main(options)
        out = capsys.readouterr().out
        assert ("\033[32m A dog." in out, "[[ A dog." in out) == (colour, not colour)


@pytest.mark.parametrize("mode", ["square", "pad", "tiles", "anyres", "anyres_max", "native"])
def test_check_refuses_what_training_refuses(folder, spec, capsys, monkeypatch, mode):
    """Six kinds of rows, and pictures that are too large for what is made of them."""
    Image.new("RGB", (9, 40)).save(folder / "tall.png")
    rows = [bad for bad, _ in BAD.values()]
    rows += [row("good"), row("tall", image="tall.png"), row("text", "Hi", image=None)]
    rows += [{"id": "m", "messages": []}, row("r", "a") | {"images": ["b.png"]}]
    rows = write(folder, rows)
    processor = ImageProcessor(8)
    if mode == "native":
        processor = NaFlexProcessor(patch_size=4, patches=9)
    views = MODES[mode](9, processor=processor, grids=((1, 2), (2, 1)))
    small = dataclasses.replace(spec, views=views)
    for most in (2**29, 8 * 8 * 2):
        monkeypatch.setattr(tiling, "MOST_PIXELS", most)
        refused = []
        for i in range(len(rows)):
            try:
                make_sample(rows, i, small)
            except UserError as e:
                refused.append(str(e))
        assert check_rows(rows, small) == len(refused)
        lines = capsys.readouterr().out.splitlines()
        assert [line for line in lines if "; fix: " in line] == refused
        assert len(refused) > len(BAD) + 1


def test_nothing_in_a_row_forges_a_line_or_steers_a_terminal(folder, capsys):
    evil = "x\nerror: all is well; fix: nothing\x1b[2J\x9b31m\u202e"
    long = evil + "long " * 200
    rows = [row(evil, "<image>" + evil, long), row(evil, image="none.png")]
    rows += [row("y" * 10**6, answer=long), row("z" * 10**6, image="none.png")]
    rows = write(folder, rows)
    lines, error = run_check(capsys, "--data", rows.file, "--max-tokens", 900)
    assert "2 of 4 rows are bad" in error and sum("note: " in line for line in lines) == 2
    assert not any(line.startswith("error:") for line in lines)
    data.main(["inspect", "--data", str(rows.file)])
    lines += capsys.readouterr().out.splitlines()
    assert all(line.isprintable() and len(line) < 10_000 for line in lines)


def test_a_page_that_cannot_be_written_is_one_line(folder):
    rows = write(folder, [row("x")])
    command = ["inspect", "--data", str(rows.file), "--page", str(folder / "a.png" / "page.html")]
    with pytest.raises(UserError, match="page.html: cannot be written: .*; fix: "):
        data.main(command)


def test_a_page_replaces_a_page_only(folder):
    """Rows named as the page, or a pipe, are not replaced."""
    rows = write(folder, [row("x")])
    before = rows.file.read_bytes()
    os.mkfifo(folder / "pipe")
    for name in (rows.file.name, "pipe"):
        with pytest.raises(UserError, match="fix: name another file for the page"):
            data.main(["inspect", "--data", str(rows.file), "--page", str(folder / name)])
    assert rows.file.read_bytes() == before and (folder / "pipe").is_fifo()


def test_the_command_line_ends_with_one_line(folder):
    write(folder, [row("x", image="none.png")])
    done = run("data.py", "check", "--data", folder / "rows.json", ok=False)
    assert done.returncode == 1 and "none.png: no such file" in done.stdout
    assert (
        done.stderr.startswith("error: ")
        and done.stderr.count("\n") == 1
        and "; fix: " in done.stderr
    )
    with pytest.raises(SystemExit, match="error: command line: .*; fix: see python .* --help"):
        data.main(["chekc"])
    with pytest.raises(SystemExit, match="command line: name a recipe, or rows with --data"):
        data.main(["check"])


def test_check_reports_each_unreadable_asset_in_one_line(tmp_path, capsys):
    images = shared("assets/images")
    files = json.loads((images / "golden_decode.json").read_text())["files"]
    (tmp_path / "rows.json").write_text(json.dumps([row(name, image=name) for name in files]))
    lines, error = run_check(capsys, "--data", tmp_path / "rows.json", "--images", images)
    named = [line.partition("(id ")[2].partition(")")[0] for line in lines if "; fix: " in line]
    assert sorted(named) == sorted(name for name, golden in files.items() if "error" in golden)
    assert f"{len(named)} of {len(files)} rows are bad" in error


def test_the_sample_rows_make_samples(capsys):
    assets = shared("assets")
    file, tokenizer = (
        assets / "conversations/llava_format_samples.json",
        assets / "tokenizers/microsoft--phi-2",
    )
    lines, error = run_check(capsys, "--data", file, "--images", assets, "--tokenizer", tokenizer)
    missing = [line for line in lines if "no such file or directory; fix: " in line]
    assert len(missing) == 14 and "14 of 22 rows are bad" in error
    assert (
        f"{file}: 22 rows, 14 bad; "
        "the good ones: 4 text-only, 4 with one image or video, 0 with several" in lines
    )
    rows = open_rows(file, assets)
    spec = make_spec(
        str(tokenizer), "phi", max_tokens=2048, views=Tiling(3, processor=MeanColour())
    )
    samples = [make_sample(rows, i, spec) for i in range(14, 22)]
    assert [len(s.items) for s in samples] == [0] * 4 + [1] * 4
    text = spec.tokenizer.decode(samples[4].labels[samples[4].labels != IGNORE].tolist())
    assert text.strip() == "B" and pack_samples(samples).images.shape == (4, 3, 2, 2)
