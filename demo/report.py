"""Writes what a demo run did as one page: scores beside the controls, loss curves, pictures with the answers.

    python -m demo.report out/demo        # reads that folder and its eval/, writes out/demo/report.html

The page needs no network and no script: pictures are inside it, charts are drawn here as SVG. It prints the same
scores. To see it as a picture:

    chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1000,1800 \\
        --screenshot=report.png out/demo/report.html
"""

import base64
import json
import math
import random
from collections import defaultdict
from html import escape
from pathlib import Path

import config
from checkpoints.files import write_file
from config import UserError
from evals import world

ZOOM = 4  # of the sample pictures
# How many of the sample pictures show each kind of question.
SAMPLES = {
    "existence_random": 4,
    "existence_popular": 3,
    "existence_adversarial": 4,
    "colour": 3,
    "shape": 3,
    "count": 3,
    "relation": 4,
}
MISTAKES = 16  # further wrong answers, folded away
LABELS = {
    "existence_random": "Existence, random negatives",
    "existence_popular": "Existence, popular negatives",
    "existence_adversarial": "Existence, adversarial negatives",
    "attributes": "Attributes, all",
    "colour": "Colour",
    "shape": "Shape",
    "count": "Count",
    "relation": "Relation",
}

CSS = """
:root { --ink: #1c2430; --dim: #5d6876; --rule: #dde2e8; --paper: #ffffff; --panel: #f5f7f9; --accent: #2b6cb0;
  --faint: #a9c4e4; --mark: #c2571a; --grey: #9aa5b1; --right: #1a7f4b; --wrong: #c0292f; color-scheme: light; }
@media screen and (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --dim: #98a3b0; --rule: #303a46;
  --paper: #14181e; --panel: #1d232b; --accent: #6aa9ee; --faint: #35506f; --mark: #eb8f52; --grey: #6b7683;
  --right: #5cc98d; --wrong: #f0787c; color-scheme: dark; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 960px; padding: 40px 28px 56px; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 27px; line-height: 1.25; margin: 0 0 10px; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 40px 0 6px; }
p { margin: 6px 0 14px; max-width: 74ch; }
.dim, figcaption, th small { color: var(--dim); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 0 24px; margin: 22px 0 0;
  border: solid var(--rule); border-width: 1px 0; padding: 12px 0; }
.figures div { display: flex; flex-direction: column; }
.figures b { font-size: 23px; font-weight: 600; font-variant-numeric: tabular-nums; }
.figures span { color: var(--dim); font-size: 13px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 0 5px 14px; border-bottom: 1px solid var(--rule); font-weight: 400;
  vertical-align: middle; white-space: nowrap; }
tbody th { white-space: normal; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--dim); font-size: 13px; vertical-align: bottom; }
tbody th small { display: block; font-size: 12.5px; line-height: 1.3; }
tr.part th { padding-left: 16px !important; }
td b { font-weight: 600; }
td.bar { width: 232px; line-height: 0; }
svg { display: block; overflow: visible; }
svg text { font: 12px system-ui, "DejaVu Sans", sans-serif; fill: var(--dim); }
.track { fill: var(--panel); } .score { fill: var(--accent); } .blank { fill: var(--grey); }
.tick { stroke: var(--mark); stroke-width: 2; } .whisker { stroke: var(--ink); stroke-width: 1.2; }
.axis { stroke: var(--rule); } .raw { fill: none; stroke: var(--faint); stroke-width: 1.2; }
.curve { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round; }
.point { fill: var(--mark); stroke: var(--paper); stroke-width: 1.5; }
.key { display: inline-flex; height: 20px; vertical-align: middle; align-items: center; gap: 6px;
  margin-right: 18px; font-size: 13px; color: var(--dim); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(380px, 1fr)); gap: 20px 28px; }
figure { margin: 8px 0; } figcaption { font-size: 13px; margin-top: 4px; }
figure h3 { font-size: 15px; margin: 0 0 6px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 22px 20px;
  margin-top: 16px; }
.card { break-inside: avoid; font-size: 14px; line-height: 1.4; }
.card img { display: block; image-rendering: pixelated; border: 1px solid var(--rule); border-radius: 3px;
  margin-bottom: 7px; }
.card .kind { color: var(--dim); font-size: 12px; }
.card .question { font-weight: 600; }
.right { color: var(--right); font-weight: 600; } .wrong { color: var(--wrong); font-weight: 600; }
details { margin: 18px 0; border-top: 1px solid var(--rule); padding-top: 10px; }
summary { cursor: pointer; font-weight: 600; }
pre { background: var(--panel); padding: 14px 16px; border-radius: 4px; overflow-x: auto; font-size: 12.5px; }
table.narrow { max-width: 420px; }
code { font-size: 0.92em; }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } .cards { grid-template-columns: repeat(4, 1fr); }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } h2 { break-after: avoid; } }
"""

# ----------------------------------------------------------------------------------------------- reading


def read(file, parse, fix):
    try:
        return parse(file.read_text())
    except (OSError, ValueError) as error:
        what = (
            "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        )
        raise UserError(file, what, fix) from None


def json_lines(text):
    return [json.loads(line) for line in text.splitlines()]


def read_run(folder):
    """Everything the page shows, from the files of a run. Raises UserError: which one is missing and what makes it."""
    train, run = "train first: torchrun train.py", {}
    run["recipe"] = read(folder / "recipe.toml", str, train)
    run["stages"] = read_log(read(folder / "log.jsonl", json_lines, train), folder / "log.jsonl")
    for name in ("world", "world-blank"):
        flag = " --blank" if name == "world-blank" else ""
        evaluate = f"torchrun evaluate.py --model {folder} --task world --data DIR{flag}"
        run[name] = read(folder / "eval" / f"{name}.json", json.loads, evaluate)
        rows = read(folder / "eval" / f"{name}.jsonl", json_lines, evaluate)
        run[name]["answers"] = {row["id"]: row["answer"] for row in rows}
    run["data"] = Path(run["world"]["data"])
    run["examples"] = [e for e in world.examples(run["data"]) if e["id"] in run["world"]["answers"]]
    run["made_of"] = read(
        run["data"] / "world.json", json.loads, "write the data set again: python -m demo.world OUT"
    )
    return run


def read_log(rows, file):
    """{stage: {"steps": [...], "validations": [...], "start": row, "end": row}}; of a step logged twice, the later."""
    stages = defaultdict(lambda: {"step": {}, "validation": {}, "start": None, "end": None})
    for row in rows:
        if row["event"] in ("step", "validation"):
            stages[row["stage"]][row["event"]][row["step"]] = row
        elif row["event"] in ("start", "end"):
            stages[row["stage"]][row["event"]] = row
    for name, stage in stages.items():
        if not stage["step"] or not stage["start"] or not stage["end"]:
            raise UserError(
                f"{file}:{name}", "this stage did not finish", "train on: torchrun train.py"
            )
    return {
        name: {
            "start": stage["start"],
            "end": stage["end"],
            "steps": [stage["step"][step] for step in sorted(stage["step"])],
            "validations": [stage["validation"][step] for step in sorted(stage["validation"])],
        }
        for name, stage in stages.items()
    }


# ------------------------------------------------------------------------------------------------ charts


def loss_chart(steps, validations, width=440, height=250):
    """Training loss (faint, and its running mean) and validation points over steps; the loss axis is logarithmic."""
    left, right, top, bottom = 44, width - 8, 8, height - 34
    losses = [max(row["loss"], 1e-4) for row in steps + validations]
    low, high = math.log10(min(losses)) - 0.04, math.log10(max(losses)) + 0.04
    last = max(row["step"] for row in steps + validations)

    def x(step):
        return round(left + (right - left) * step / last, 1)

    def y(loss):
        return round(
            bottom - (bottom - top) * (math.log10(max(loss, 1e-4)) - low) / (high - low), 1
        )

    def path(kind, points):
        coordinates = " ".join(f"{x(step)},{y(loss)}" for step, loss in points)
        return f'<polyline class="{kind}" points="{coordinates}"/>'

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="loss over steps">']
    decades = range(math.floor(low), math.ceil(high) + 1)
    ticks = [
        m * 10.0**d for d in decades for m in (1, 2, 5) if low <= math.log10(m * 10.0**d) <= high
    ]
    for tick in ticks:
        parts.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{y(tick)}" y2="{y(tick)}"/>')
        parts.append(f'<text x="{left - 7}" y="{y(tick) + 4}" text-anchor="end">{tick:g}</text>')
    for step in even_ticks(last):
        parts.append(f'<text x="{x(step)}" y="{bottom + 17}" text-anchor="middle">{step}</text>')
    parts.append(
        f'<text x="{(left + right) / 2}" y="{height - 2}" text-anchor="middle">optimizer steps</text>'
    )
    pairs = [(row["step"], row["loss"]) for row in steps]
    parts += [path("raw", pairs), path("curve", running_mean(pairs))]
    for row in validations:
        title = f"<title>validation loss {row['loss']:.3f} at step {row['step']}</title>"
        parts.append(
            f'<circle class="point" r="4.5" cx="{x(row["step"])}" cy="{y(row["loss"])}">{title}</circle>'
        )
    return "".join(parts) + "</svg>"


def even_ticks(last):
    """0, and up to five round numbers, the last no larger than `last`."""
    size = 10 ** math.floor(math.log10(max(last, 1)))
    step = next(
        size * m for m in (0.1, 0.2, 0.5, 1, 2, 5) if size * m >= 1 and last / (size * m) <= 5
    )
    return [round(step * i) for i in range(int(last / step) + 1)]


def running_mean(pairs):
    """Each point the mean of its neighbours, a twentieth of the run to either side, less at the ends."""
    reach = max(1, len(pairs) // 20)
    means = []
    for i, (step, _) in enumerate(pairs):
        near = min(reach, i, len(pairs) - 1 - i)
        window = [loss for _, loss in pairs[i - near : i + near + 1]]
        means.append((step, sum(window) / len(window)))
    return means


def score_bar(score, blank, text_only, margin, width=232):
    """The model's score with its 95 % interval, the blanked control below it, a tick where words alone get to."""

    def x(percent):
        return round(width * min(max(percent, 0), 100) / 100, 1)

    whisker = f"M{x(score - margin)},8H{x(score + margin)}"
    return (
        f'<svg width="{width}" height="24" role="img" aria-label="{score:.1f} percent">'
        f'<rect class="track" width="{width}" height="24" rx="2"/>'
        f'<rect class="score" y="3" width="{x(score)}" height="10" rx="1"/>'
        f'<rect class="blank" y="16" width="{x(blank)}" height="5" rx="1"/>'
        f'<path class="whisker" d="{whisker}"/>'
        f'<line class="tick" x1="{x(text_only)}" x2="{x(text_only)}" y1="0" y2="24"/></svg>'
    )


# ----------------------------------------------------------------------------------------------- samples


def group_of(example):
    return example["kind"] if example["split"] == "attributes" else example["split"]


def choose_samples(examples, right):
    """(samples, further mistakes). Every kind of question appears as SAMPLES says, and wrong answers as often as
    they occur: their number is the whole error rate's share, dealt to the kinds by their own error rates."""
    rng, pools = random.Random(0), defaultdict(lambda: {True: [], False: []})
    for example in examples:
        pools[group_of(example)][right[example["id"]]].append(example)
    expected = {}
    for group, size in SAMPLES.items():
        for pool in pools[group].values():
            rng.shuffle(pool)
        expected[group] = (
            size * len(pools[group][False]) / max(1, sum(map(len, pools[group].values())))
        )
    wrong = {group: int(value) for group, value in expected.items()}
    by_remainder = sorted(expected, key=lambda group: wrong[group] - expected[group])
    for group in by_remainder[: round(sum(expected.values())) - sum(wrong.values())]:
        wrong[group] += 1
    samples = []
    for group, size in SAMPLES.items():
        good = pools[group][True][: size - wrong[group]]
        samples += good + [pools[group][False].pop() for _ in range(wrong[group])]
    rng.shuffle(samples)
    left = [example for group in SAMPLES for example in pools[group][False]]
    return samples, rng.sample(left, min(MISTAKES, len(left)))


def card(example, run, right):
    """One picture with its question, the model's answer, the truth if that differs, and the blanked answer."""
    file = run["data"] / example["image"]
    if not file.is_file():
        raise UserError(file, "no such file", "run this in the folder that evaluate.py ran in")
    picture = base64.b64encode(file.read_bytes()).decode()
    side = run["made_of"]["image_size"] * ZOOM
    answer, blank = (
        escape(run[name]["answers"].get(example["id"], "")) for name in ("world", "world-blank")
    )
    said = f'<span class="right">{answer} ✓</span>'
    if not right[example["id"]]:
        said = f'<span class="wrong">{answer or "(nothing)"} ✗</span> · truth: {escape(example["label"])}'
    kind = LABELS[group_of(example)].replace(" negatives", "").lower()
    return (
        f'<div class="card"><img src="data:image/png;base64,{picture}" width="{side}" height="{side}" alt="">'
        f'<div class="kind">{kind}</div><div class="question">{escape(example["prompt"])}</div><div>{said}</div>'
        f'<div class="dim">picture blanked: {blank or "(nothing)"}</div></div>'
    )


# -------------------------------------------------------------------------------------------------- page


def margin(s):
    """Half the width of the 95 % interval of a score, in points (Wilson's, which is not zero at 100 %)."""
    p, n, z = s["score"] / 100, s["n"], 1.96
    return 100 * z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))


def duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def score_rows(run):
    scores, blank = run["world"]["scores"], run["world-blank"]["scores"]
    asked = {group_of(e): e["prompt"] for e in reversed(run["examples"])}
    rows = []
    for name, label in LABELS.items():
        s, b = scores[name], blank[name]["score"]
        example = f"<small>{escape(asked[name])}</small>" if name in asked else ""
        part = ' class="part"' if name in ("colour", "shape", "count", "relation") else ""
        rows.append(
            f"<tr{part}><th>{label}{example}</th><td><b>{s['score']:.1f}</b></td><td class=dim>± {margin(s):.1f}</td>"
            f"<td>{b:.1f}</td><td>{s['text_only']:.1f}</td><td>{s['chance']:.1f}</td><td class=dim>{s['n']}</td>"
            f'<td class="bar">{score_bar(s["score"], b, s["text_only"], margin(s))}</td></tr>'
        )
    return "".join(rows)


def key(mark, text):
    return f'<span class="key">{mark}{text}</span>'


def stage_figure(name, stage):
    steps, end = stage["steps"], stage["end"]
    mean = {
        key: sum(row[key] for row in steps) / len(steps)
        for key in ("tokens_per_s", "images_per_s", "data_wait")
    }
    said = f"{steps[-1]['steps']:,} steps in {duration(end['seconds'])}; "
    if stage["validations"]:
        said += f"validation loss {stage['validations'][-1]['loss']:.3f} at the end; "
    said += (
        f"{mean['images_per_s']:,.0f} pictures and {mean['tokens_per_s']:,.0f} tokens a second, "
    )
    said += f"{100 * mean['data_wait']:.1f} % of the time waiting for data; "
    said += f"peak memory {max(row['memory_gb'] for row in steps):.2f} GB."
    chart = loss_chart(steps, stage["validations"])
    return f"<figure><h3>{escape(name)}</h3>{chart}<figcaption>{said}</figcaption></figure>"


def parts_table(stages):
    """Parameters per part, and how many of them each stage trained."""
    first = next(iter(stages.values()))["start"]["parameters"]
    head = "".join(f"<th>trained in {escape(name)}</th>" for name in stages)
    body = ""
    for part, count in first.items():
        trained = [stage["start"]["trainable"].get(part, 0) for stage in stages.values()]
        cells = "".join(f"<td>{n:,}</td>" if n else '<td class="dim">frozen</td>' for n in trained)
        body += f"<tr><th>{escape(part)}</th><td>{count:,}</td>{cells}</tr>"
    return f"<table><thead><tr><th>part</th><th>parameters</th>{head}</tr></thead><tbody>{body}</tbody></table>"


def page(run):
    scores, stages = run["world"]["scores"], run["stages"]
    answers = run["world"]["answers"]
    right = {e["id"]: world.is_right(e, answers[e["id"]]) for e in run["examples"]}
    samples, mistakes = choose_samples(run["examples"], right)
    errors, shown = sum(not r for r in right.values()), sum(not right[e["id"]] for e in samples)
    parameters = sum(next(iter(stages.values()))["start"]["parameters"].values())
    training = sum(stage["end"]["seconds"] for stage in stages.values())
    existence = min(s["score"] for name, s in scores.items() if name.startswith("existence"))
    rows = run["made_of"]["rows"]
    figures = [
        (f"{existence:.1f} %", "existence, the worst of three splits (chance 50)"),
        (
            f"{scores['attributes']['score']:.1f} %",
            f"attributes (chance {scores['attributes']['chance']:.0f})",
        ),
        (f"{parameters / 1e6:.2f} M", "parameters, language model to pixels"),
        (duration(training), "training, both stages"),
    ]
    times = [(f"training, {name}", stage["end"]["seconds"]) for name, stage in stages.items()]
    times += [
        (f"evaluation{', blanked' * ('blank' in key)}", run[key]["seconds"])
        for key in ("world", "world-blank")
    ]
    more = "".join(card(e, run, right) for e in mistakes)
    more = "".join(card(e, run, right) for e in mistakes)
    if mistakes:
        head = f"<summary>{len(mistakes)} more of the wrong answers</summary>"
        more = f'<details>{head}<div class="cards">{more}</div></details>'
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>barellava: the demo</title><style>{CSS}</style></head><body>
<h1>A small multimodal model, trained from nothing and asked about pictures it has not seen</h1>
<p>A vision encoder, a connector and a language model, {parameters / 1e6:.2f} million parameters together, learned from
{rows["pretrain"]:,} captioned pictures of coloured shapes and then from questions about {rows["finetune"]:,} others.
The benchmark shows combinations of objects that occur in no training picture. Each question is asked once with each of
its possible answers, so whoever answers from the words alone gets what chance gets: what is above it was seen.</p>
<div class="figures">{"".join(f"<div><b>{value}</b><span>{what}</span></div>" for value, what in figures)}</div>

<h2>Scores</h2>
<p class="dim">Percent right on held-out pictures, with the 95 % interval. <em>Blanked</em>: the same questions with
every picture replaced by the mean of many. <em>Text only</em>: the answer that the training rows give most often to
the same words.</p>
<div>{key('<svg width="22" height="10"><rect class="score" width="22" height="10" rx="1"/></svg>', "model")}
{key('<svg width="22" height="5"><rect class="blank" width="22" height="5" rx="1"/></svg>', "pictures blanked")}
{key('<svg width="4" height="16"><line class="tick" x1="2" x2="2" y2="16"/></svg>', "text only")}</div>
<table><thead><tr><th></th><th>model</th><th></th><th>blanked</th><th>text only</th><th>chance</th><th>n</th>
<th></th></tr></thead><tbody>{score_rows(run)}</tbody></table>

<h2>Training</h2>
<div>{key('<svg width="22" height="4"><line class="curve" x2="22" y1="2" y2="2"/></svg>', "training loss")}
{key('<svg width="10" height="10"><circle class="point" cx="5" cy="5" r="4.5"/></svg>', "validation loss, held out")}
</div>
<div class="charts">{"".join(stage_figure(name, stage) for name, stage in stages.items())}</div>

<h2>What it sees</h2>
<p class="dim">{len(samples)} of the {len(right):,} questions, drawn with a fixed seed so that every kind appears and
wrong answers are as frequent as they are: {errors} of all ({100 * errors / len(right):.1f} %), {shown} here. Pictures
are enlarged {ZOOM} times.</p>
<div class="cards">{"".join(card(e, run, right) for e in samples)}</div>
{more}
<h2>What it is made of</h2>
{parts_table(stages)}

<h2>Time taken</h2>
<table class="narrow"><tbody>{"".join(f"<tr><th>{w}</th><td>{duration(s)}</td></tr>" for w, s in times)}</tbody></table>
<details><summary>The recipe, every field written out</summary><pre>{escape(run["recipe"])}</pre></details>
<p class="dim">World of seed {run["made_of"]["seed"]}. Written by <code>python -m demo.report</code> from the files of the
run.</p>
</body></html>
"""


def main(argv):
    parser = config.parser(__doc__)
    parser.add_argument(
        "folder",
        help="a run's folder: its log, and the answers of evaluate.py with and without --blank",
    )
    folder = Path(parser.parse_args(argv).folder)
    run = read_run(folder)
    write_file(folder / "report.html", page(run))
    print(f"{'':24}{'score':>8}{'blanked':>9}{'text only':>11}{'chance':>8}{'n':>7}")
    for name, s in run["world"]["scores"].items():
        blank = run["world-blank"]["scores"][name]["score"]
        print(
            f"{name:24}{s['score']:8.1f}{blank:9.1f}{s['text_only']:11.1f}{s['chance']:8.1f}{s['n']:7}"
        )
    print(f"report: {folder / 'report.html'}")


if __name__ == "__main__":
    config.cli(main, __doc__)
