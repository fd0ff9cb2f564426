"""The benchmarks: their output without a GPU, that a wrong kernel is seen, and their page."""

import json
import re
from xml.etree import ElementTree

import pytest

import bench.data
import bench.report
from bench.kernels import OURS
from bench.operations import shapes
from bench.report import SECTIONS
from config import UserError
from tests.tools.environment import ROOT, run

SCRIPTS = [
    f"bench/{f.name}" for f in sorted((ROOT / "bench").glob("*.py")) if "__main__" in f.read_text()
]


def test_sizes_are_within_their_limits():
    limits = {
        "report.py": 160,
        "training.py": 540,
        "data.py": 360,
    }
    for name, limit in limits.items():
        assert len((ROOT / "bench" / name).read_text().splitlines()) <= limit


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_and_a_wrong_option_is_one_line(script):
    assert f"python {script}" in run(script, "--help").stdout
    wrong = run(script, "--no-such-option", ok=False).stderr.strip().splitlines()
    assert len(wrong) == 1 and wrong[0].startswith("error: ") and "; fix: " in wrong[0]


def cell(ms: float, ratio: float, share: float = 0.5) -> dict:
    return {
        "megabytes": 12.3,
        "ms": ms,
        "range": [ms, ms],
        "share": share,
        "error": 2e-3,
        "ratio": ratio,
    }


def marks(*names: str) -> str:
    return "".join(f"<!-- {name} -->\n<!-- end -->\n" for name in names)


def test_report_judges_targets_and_draws(tmp_path):
    shape = next(iter(shapes()["attention"]))
    cells = {
        OURS: cell(1.0, 1.0),
        "FlashAttention-2": cell(1.25, 1.25),
        "cuDNN": cell(0.8, 0.8),
        "half (bound)": cell(0.1, 0.1),
        "flex_attention": {"reason": "RuntimeError: not <this>"},
    }
    targets = {"FlashAttention-2": 1.2, "cuDNN": 0.9}
    attention = {
        "date": "2026-01-01 00:00",
        "versions": {"torch": "2.11"},
        "ceilings": {"product, FLOP/s": 7.9e14},
        "shapes": {shape: {"targets": targets, "forward": cells}},
    }
    result = {
        "gpu": "Made-up GPU",
        "limits": [1.0, 1.0],
        "dtype": "bfloat16",
        "cut": 1,
        "operations": {"attention": attention},
    }
    (tmp_path / "made-up").mkdir()
    (tmp_path / "made-up" / "kernels.json").write_text(json.dumps(result))
    page = tmp_path / "page.md"
    page.write_text(
        f"before\n<!-- kernels -->\nold\n<!-- end -->\nbetween\n{marks(*list(SECTIONS)[1:])}after\n"
    )
    for _ in range(2):  # the second time changes nothing
        bench.report.main(["--results", str(tmp_path), "--page", str(page)])
        text = page.read_text()
        assert (
            text.startswith("before\n")
            and text.endswith("after\n")
            and "\nbetween\n" in text
            and "old" not in text
        )
        row = (
            f"| {shape} | forward | 1.000 | 50% | 12 | 2e-03 "
            "| 1.25 (≥ 1.20) | **0.80** (≥ 0.90) | 0.10 | [1] |"
        )
        assert (
            text.count(row) == 1
            and text.count("1. flex_attention: RuntimeError: not &lt;this&gt;") == 1
        )
        assert (
            "2026-01-01 00:00, torch 2.11, product, FLOP/s 7.9e+14\n" in text
            and "on a GPU" not in text
        )
    assert "![each kernel beside its fastest peer](made-up/kernels.svg)" in text
    drawn = ElementTree.parse(tmp_path / "made-up" / "kernels.svg")
    texts = [t.text for t in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert (
        "0.80 x" in texts and texts.count("not measured yet") == len(shapes()) - 1
    )  # the bound is no peer
    assert len(list(drawn.iter("{http://www.w3.org/2000/svg}circle"))) == 1
    page.write_text("no marks\n")
    with pytest.raises(UserError, match="no <!-- kernels -->.*; fix: "):
        bench.report.main(["--results", str(tmp_path), "--page", str(page)])
    assert page.read_text() == "no marks\n"


def printed() -> dict[str, dict]:
    """Small results of the scripts whose own tables go onto the page, every target met."""
    facts = {"date": "2026-01-02", "versions": {"python": "3.11", "transformers": None}}
    ms = {
        "barellava": [10.0, 12.0, 11.0],
        "every frame": [22.0, 23.0, 21.0],
        "16 converted": [16.0, 18.0, 17.0],
    }
    clip, rows = (
        {"frames": 100, "seconds": 4.0, "ms": ms},
        {"seconds": 2.0, "peak_mb": 30.0, "rows": 5000},
    )
    fills = {"fill dealt": 0.97, "balance dealt": 0.5, "ms": 1.0}
    pictures = [{"images_per_s": 100.0, "cpu_ms": 9.0}, {"images_per_s": 150.0, "cpu_ms": 6.0}]
    case = {
        "kind": "bfloat16",
        "batch": 1,
        "threads": 2,
        "rates": {"barellava": [20.0], "transformers": [10.0]},
        "ratios": {"transformers": [2.0]},
        "step_ms": 1.0,
        "bytes": 10,
        "equal": {"transformers": 1},
        "tokens": 2,
    }
    one = {"v": 1.0, "i": 1.0, "q": 1.0, "gain": 1.6, "possible": 2.0}
    asked = {"kind": "float32", "rounds": [one], "equal": True, "shares": [0.8]}
    models = {"toy": {"memory": {"2": 1e6}, "parameters": 2e6, "cases": [case], "questions": asked}}
    takes = {
        n: [{"peak": (peak + more) * 1e6, "features": size} for more in (0, 9, -1)]
        for n, peak, size in (("32", 50, 10e6), ("128", 80, 40e6))
    }
    video = {
        "date": "2026-01-02",
        "versions": {"python": "3.11"},
        "repeats": 3,
        "memory": takes,
        "clips": {"a.mp4": clip, "12 x a.mp4": clip | {"frames": 1200}},
    }
    index = {
        "bytes": 2e9,
        "worker": {"rss_mb": 300.0, "pss_mb": 90.0},
        "runs": {name: [rows] for name in ("json.load", "first start", "later start")},
    }
    packing = {
        "tokens": {"rows": 4000, "mean": 700.0, "longest": 2048},
        "cases": {f"{n} samples, 1 ranks": fills for n in (128, 256)},
    }
    images = {"clip, 0 workers": {"ours": pictures, "theirs": pictures[:1]}}
    parts = {"images": images, "index": index, "packing": packing}
    loaded = {"seconds": 3.0, "weights": 10**9, "peak": 2 * 10**9, "imports": 10**9}
    made = {
        "video": video,
        "data": {name: facts | {"results": part} for name, part in parts.items()},
        "generate": {
            "machine": "cpu",
            "date": "2026-01-02",
            "torch": "2.11",
            "models": models,
        },
        "load": {name: [loaded] for name in ("barellava", "transformers")},
    }
    return json.loads(json.dumps(made))  # nothing is shared between its parts


def slow_video(r):
    ms = r["video"]["clips"]["12 x a.mp4"]["ms"]
    ms.update({"every frame": [21.0, 22.0, 20.0]})


def large_video(r):
    r["video"]["memory"]["128"][0].update(peak=81e6)


def slow_first_start(r):
    r["data"]["index"]["results"]["runs"]["first start"][0].update(seconds=61.0)


def slow_later_start(r):
    later = r["data"]["index"]["results"]["runs"]["later start"]
    later.append({"seconds": 2.5, "peak_mb": 1.0, "rows": 5000})


def large_worker(r):
    r["data"]["index"]["results"]["worker"].update(rss_mb=301.0)


def loose_packing(r):
    cases = r["data"]["packing"]["results"]["cases"]
    fills = {"fill dealt": 0.96, "balance dealt": 1.0, "ms": 1.0}
    cases.update({"128 samples, 1 ranks": fills})


def fast_peer_of_images(r):
    clip = r["data"]["images"]["results"]["clip, 0 workers"]
    clip.update(theirs=[{"images_per_s": 120.0, "cpu_ms": 9.0}])


def slow_generation(r):
    r["generate"]["models"]["toy"]["cases"][0]["ratios"].update(transformers=[1.99])


def slow_load(r):
    r["load"]["barellava"][0].update(seconds=3.1)


# what of it makes a target missed, and the words for it
MISSED = {
    "video, speed": (slow_video, "target >= 2 x every frame, 12 x a.mp4: MISSED (1.91)"),
    "video, memory": (
        large_video,
        "target 128 frames <= 32 and the features (30 MB more): MISSED (31 MB more)",
    ),
    "index, first": (slow_first_start, "target first start <= 60 s: MISSED (61)"),
    "index, later": (slow_later_start, "target later <= 2 s: MISSED (2.5)"),
    "index, worker": (large_worker, "target <= 300 MB a worker: MISSED (301)"),
    "packing": (loose_packing, "target fill >= 97 %, 128 samples, 1 ranks: MISSED (0.96)"),
    "images": (fast_peer_of_images, "target >= 1.5 x: MISSED (1.25)"),
    "generate": (slow_generation, "target 2 x transformers: MISSED"),
    "load": (slow_load, "target seconds <= 3.0: MISSED (3.100 at worst)"),
}


def page_of(results: dict[str, dict], folder) -> str:
    """What report.py makes of them, as results of a machine `m`."""
    (folder / "m").mkdir(exist_ok=True)
    for name, result in results.items():
        (folder / "m" / f"{name}.json").write_text(json.dumps(result))
    page = folder / "page.md"
    page.write_text(marks(*SECTIONS))
    bench.report.main(["--results", str(folder), "--page", str(page)])
    return page.read_text()


def test_printed_tables_stand_on_the_page(tmp_path):
    text = page_of(printed(), tmp_path)
    for name in ("generate", "load", "data", "video"):
        section = text.split(f"<!-- {name} -->")[1].split("<!-- end -->")[0].strip()
        assert section.startswith("### m\n\n```\n") and section.endswith("\n```")
        assert section.count("```") == 2 and ": met" in section and "MISSED" not in section
    rows = (
        "2026-01-02, python 3.11\na.mp4: 100 frames, 4.0 s; ms, median (range) of 3",
        "  barellava           11 (10 to 12)    1.00 x",
        "  every frame         22 (21 to 23)    2.00 x",
        "encoding 128 frames: 80 MB (79 to 89) of 3, features 40 MB",
        "index: 2026-01-02, python 3.11\n5000 rows, 2.00 GB, median (range) of 1 runs",
        f"first start      2.00 (2.00 to 2.00){'30':>22}",
        "128 samples, 1 ranks            97.0%           50.0%        1.0",
        "clip, 0 workers         150       100           6.0     9.0           1.50"
        "  target >= 1.5 x: met (1.5)",
        "2026-01-02, torch 2.11\ntoy, 2 million",
    )
    assert [row for row in rows if row not in text] == []
    parts = [text.index(part) for part in ("index: 2026", "packing: 2026", "images: 2026")]
    assert parts == sorted(parts)
    assert "not measured yet" not in text.split("<!-- generate -->")[1]
    (tmp_path / "m" / "video.json").unlink()
    assert page_of({}, tmp_path).endswith("<!-- video -->\n\nnot measured yet.\n\n<!-- end -->\n")


@pytest.mark.parametrize("which", MISSED)
def test_a_missed_target_is_said(which, tmp_path):
    results = printed()
    change, words = MISSED[which]
    change(results)
    text = page_of(results, tmp_path)
    assert words in text and text.count("MISSED") == 1


def test_a_part_of_the_data_keeps_the_others(tmp_path, monkeypatch, capsys):
    file, before = tmp_path / "new" / "data.json", printed()["data"]
    fill = before["packing"]["results"] | {"tokens": {"rows": 4321, "mean": 700.0, "longest": 2048}}
    monkeypatch.setattr(bench.data, "child", lambda name, *more: fill if name == "packing" else {})
    bench.data.main(["--only", "packing", "--json", str(file)])
    assert list(json.loads(file.read_text())) == ["packing"]
    file.write_text(json.dumps(before))
    bench.data.main(["--only", "packing", "--json", str(file)])
    found = json.loads(file.read_text())
    assert found.pop("packing")["results"] == fill and before.pop("packing") and found == before
    printed_now = capsys.readouterr().out
    assert "4321 rows" in printed_now and "index" not in printed_now and ", torch " in printed_now


@pytest.mark.parametrize("name", SECTIONS)
def test_a_missing_mark_is_an_error(name, tmp_path):
    page, text = tmp_path / "page.md", marks(*(n for n in SECTIONS if n != name))
    page.write_text(text)
    with pytest.raises(UserError, match=f"no <!-- {name} --> before an <!-- end -->; fix: "):
        bench.report.main(["--results", str(tmp_path), "--page", str(page)])
    assert page.read_text() == text


def test_the_page_holds_what_was_measured(tmp_path):
    """PERFORMANCE.md is what report.py makes of bench/results now."""
    text, again = (ROOT / "PERFORMANCE.md").read_text(), tmp_path / "PERFORMANCE.md"
    again.write_text(text)
    bench.report.main(["--page", str(again)])
    without_links = [re.sub(r"\]\([^)]*\)", "]", t) for t in (again.read_text(), text)]
    assert without_links[0] == without_links[1]
