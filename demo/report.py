"""The report of a demo run: scores beside the controls, loss curves, pictures with the answers.

    python -m demo.report out/demo    # reads that folder and its eval/, writes out/demo/report.html

It prints the same scores. results.py reads the run and computes; this file draws. The page is one
file and needs no network and no script: its pictures are inside it, its charts are SVG. To see it
as a picture:

    chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1000,1800 \\
        --screenshot=report.png out/demo/report.html

The file in order: charts, then a function for each part of the page from top to bottom, which
returns HTML, then the whole page and the command.
"""

from html import escape
from pathlib import Path

import command_line
from checkpoints.files import write_file
from config import UserError
from demo.results import (
    Run,
    StageResult,
    choose_samples,
    group_of,
    margin,
    read_run,
    running_mean,
)
from inputs import charts
from inputs.charts import Frame
from inputs.preview import html_page, image_tag

ZOOM = 3  # of the sample pictures
LABELS = {
    "existence_random": "Existence, random negatives",
    "existence_popular": "Existence, popular negatives",
    "existence_adversarial": "Existence, adversarial negatives",
    "attributes": "Attributes, all",
    "colour": "Colour",
    "shape": "Shape",
    "count": "Count",
    "relation": "Relation",
    "unseen_sizes": "Unseen sizes",
    "unseen_positions": "Unseen positions",
    "unseen_backgrounds": "Unseen backgrounds",
    "unseen_objects": "More objects",
}
PARTS_OF_ATTRIBUTES = ("colour", "shape", "count", "relation")
BAR_WIDTH = 232  # pixels

# The marks of the charts, for the line that explains them.
MODEL_MARK = '<svg width="22" height="10"><rect class="score" width="22" height="10" rx="1"/></svg>'
BLANK_MARK = '<svg width="22" height="5"><rect class="blank" width="22" height="5" rx="1"/></svg>'
TEXT_MARK = '<svg width="4" height="16"><line class="tick" x1="2" x2="2" y2="16"/></svg>'
CURVE_MARK = '<svg width="22" height="4"><line class="curve" x2="22" y1="2" y2="2"/></svg>'
POINT_MARK = '<svg width="10" height="10"><circle class="point" cx="5" cy="5" r="4.5"/></svg>'


# ---------------------------------------------------------------------- charts


LEAST_LOSS = 1e-4  # a loss of zero has no logarithm
ROOM = 1.1  # a factor on the largest loss, and under the smallest


def loss_chart(stage: StageResult) -> str:
    """Return the training loss (faint), its running mean, and validation points, over steps."""
    rows = stage.steps + stage.validations
    shown = [max(row["loss"], LEAST_LOSS) for row in rows]
    last_step = max(row["step"] for row in rows)
    x = charts.Linear(0, last_step, Frame.LEFT, Frame.RIGHT)
    y = charts.Log(min(shown) / ROOM, max(shown) * ROOM, Frame.BOTTOM, Frame.TOP)

    parts = [charts.opening("loss over steps"), *charts.rules(y)]
    parts += charts.numbers_below(x, "optimizer steps")

    # The curves.
    losses = [(row["step"], max(row["loss"], LEAST_LOSS)) for row in stage.steps]
    parts.append(charts.line("raw", losses, x, y))
    parts.append(charts.line("curve", running_mean(losses), x, y))

    # The validation points, over the curves.
    for row in stage.validations:
        place = f'cx="{x.at(row["step"])}" cy="{y.at(max(row["loss"], LEAST_LOSS))}"'
        title = f"<title>validation loss {row['loss']:.3f} at step {row['step']}</title>"
        parts.append(f'<circle class="point" r="4.5" {place}>{title}</circle>')
    return "".join(parts) + "</svg>"


def score_bar(score: dict, blank: float) -> str:
    """Return a bar: the score and its interval, below it the score with blanked pictures.

    A tick marks what the words alone reach.
    """

    def x(percent: float) -> float:
        # An interval may reach beyond 0 or 100; its whisker ends there.
        percent = min(max(percent, 0), 100)
        return round(BAR_WIDTH * percent / 100, 1)

    percent = score["score"]
    low = x(percent - margin(score))
    high = x(percent + margin(score))
    tick = x(score["text_only"])
    return (
        f'<svg width="{BAR_WIDTH}" height="24" role="img" aria-label="{percent:.1f} percent">'
        f'<rect class="track" width="{BAR_WIDTH}" height="24" rx="2"/>'
        f'<rect class="score" y="3" width="{x(percent)}" height="10" rx="1"/>'
        f'<rect class="blank" y="16" width="{x(blank)}" height="5" rx="1"/>'
        f'<path class="whisker" d="M{low},8H{high}"/>'
        f'<line class="tick" x1="{tick}" x2="{tick}" y1="0" y2="24"/></svg>'
    )


# ---------------------------------------------------------------------- the top of the page


def duration(seconds: float) -> str:
    """Return seconds for a reader: "7 min 05 s"."""
    minutes, seconds = divmod(round(seconds), 60)
    if minutes:
        return f"{minutes} min {seconds:02d} s"
    return f"{seconds} s"


def introduction(run: Run) -> str:
    """Return what was trained on what."""
    millions = sum(run.parameters.values()) / 1e6
    rows = run.facts["rows"]
    return f"""
<h1>A small multimodal model, trained from nothing and asked about pictures it has not seen</h1>
<p>A vision encoder, a connector and a language model, {millions:.2f} million parameters together,
learned from {rows["pretrain"]:,} captioned pictures of coloured shapes and then from questions
about {rows["finetune"]:,} others. How objects stand to each other it was asked about all of these.
The benchmark shows combinations of objects that occur in no training picture. Each question comes
once with each of its possible answers, so the words alone reach exactly the chance level. What
is above it was seen.</p>"""


def figures(run: Run) -> str:
    """Return the four numbers that sum up the run."""
    existence = []
    for name, score in run.seeing.scores.items():
        if name.startswith("existence"):
            existence.append(score["score"])
    attributes = run.seeing.scores["attributes"]
    millions = sum(run.parameters.values()) / 1e6
    training = sum(stage.end["seconds"] for stage in run.stages.values())

    shown = {
        "existence, the worst of three splits (chance 50)": f"{min(existence):.1f} %",
        f"attributes (chance {attributes['chance']:.0f})": f"{attributes['score']:.1f} %",
        "parameters, language model to pixels": f"{millions:.2f} M",
        "training, all stages": duration(training),
    }
    cells = ""
    for what, value in shown.items():
        cells += f"<div><b>{value}</b><span>{what}</span></div>"
    return f'<div class="figures">{cells}</div>'


# ---------------------------------------------------------------------- scores


def key(mark: str, text: str) -> str:
    """Return a mark of a chart with its meaning."""
    return f'<span class="key">{mark}{text}</span>'


def score_row(name: str, run: Run) -> str:
    """Return a row of the table of scores, with an example question."""
    score = run.seeing.scores[name]
    blank = run.blanked.scores[name]["score"]

    # The first question of the group is its example. All attributes together have no own question.
    question = ""
    for example in run.examples:
        if group_of(example) == name:
            question = f"<small>{escape(example['prompt'])}</small>"
            break

    # The parts of the attributes are indented below their sum.
    row_class = ""
    if name in PARTS_OF_ATTRIBUTES:
        row_class = ' class="part"'
    return (
        f"<tr{row_class}><th>{LABELS[name]}{question}</th>"
        f"<td><b>{score['score']:.1f}</b></td>"
        f'<td class="dim">± {margin(score):.1f}</td>'
        f"<td>{blank:.1f}</td>"
        f"<td>{score['text_only']:.1f}</td>"
        f"<td>{score['chance']:.1f}</td>"
        f'<td class="dim">{score["n"]}</td>'
        f'<td class="bar">{score_bar(score, blank)}</td></tr>'
    )


def scores_section(run: Run) -> str:
    """Return the scores, beside their controls."""
    rows = "".join(score_row(name, run) for name in LABELS)
    return f"""
<h2>Scores</h2>
<p class="dim">Percent right on held-out pictures, with the 95 % interval. <em>Blanked</em>: the
same questions with every picture replaced by the mean of many. <em>Text only</em>: the answer that
the training rows give most often to the same words. The last four rows ask all kinds of questions
about pictures that differ from training in one thing: smaller and larger objects, objects between
the cells, darker backgrounds, five or six objects.</p>
<div>{key(MODEL_MARK, "model")}
{key(BLANK_MARK, "pictures blanked")}
{key(TEXT_MARK, "text only")}</div>
<table><thead><tr><th></th><th>model</th><th></th><th>blanked</th><th>text only</th>
<th>chance</th><th>n</th><th></th></tr></thead><tbody>{rows}</tbody></table>"""


# ---------------------------------------------------------------------- training


def stage_figure(name: str, stage: StageResult) -> str:
    """Return the loss chart of a stage, with its speed and memory below."""

    def mean(field: str) -> float:
        return sum(row[field] for row in stage.steps) / len(stage.steps)

    # "steps" is the length of the stage, which every row has beside its own step.
    steps = stage.steps[-1]["steps"]
    images = mean("images_per_s")
    tokens = mean("tokens_per_s")
    waiting = 100 * mean("data_wait")

    said = f"{steps:,} steps in {duration(stage.end['seconds'])}; "
    if stage.validations:
        said += f"validation loss {stage.validations[-1]['loss']:.3f} at the end; "
    said += f"{images:,.0f} pictures and {tokens:,.0f} tokens a second, "
    said += f"{waiting:.1f} % of the time waiting for data"
    memory = [row["memory_gb"] for row in stage.steps if "memory_gb" in row]
    if memory:
        said += f"; peak memory {max(memory):.2f} GB"
    said += "."

    chart = loss_chart(stage)
    return f"<figure><h3>{escape(name)}</h3>{chart}<figcaption>{said}</figcaption></figure>"


def training_section(run: Run) -> str:
    """Return the loss of each stage."""
    charts = ""
    for name, stage in run.stages.items():
        charts += stage_figure(name, stage)
    return f"""
<h2>Training</h2>
<div>{key(CURVE_MARK, "training loss")}
{key(POINT_MARK, "validation loss, held out")}
</div>
<div class="charts">{charts}</div>"""


# ---------------------------------------------------------------------- samples


def show_answer(answer: str) -> str:
    """Return an answer for the page, where an empty one must be seen too."""
    if not answer:
        return "(nothing)"
    return escape(answer)


def question_card(example: dict, run: Run) -> str:
    """Return one picture with its question, the answer, the truth if that differs, and the control.

    Raises UserError if the picture is not there.
    """
    file = run.data / example["image"]
    if not file.is_file():
        raise UserError(file, "no such file", "run this in the folder that evaluate.py ran in")
    picture = image_tag(file.read_bytes(), run.facts["image_size"] * ZOOM)

    kind = LABELS[group_of(example)].replace(" negatives", "").lower()
    name = example["id"]
    answer = run.seeing.answers[name]
    if run.right[name]:
        said = f'<span class="right">{escape(answer)} ✓</span>'
    else:
        truth = escape(example["label"])
        said = f'<span class="wrong">{show_answer(answer)} ✗</span> · truth: {truth}'

    # The blanked evaluation may have been of fewer examples.
    blank = show_answer(run.blanked.answers.get(name, ""))
    return (
        f'<div class="card">{picture}'
        f'<div class="kind">{kind}</div>'
        f'<div class="question">{escape(example["prompt"])}</div>'
        f"<div>{said}</div>"
        f'<div class="dim">picture blanked: {blank}</div></div>'
    )


def question_cards(examples: list[dict], run: Run) -> str:
    """Return the cards of examples."""
    cards = "".join(question_card(example, run) for example in examples)
    return f'<div class="cards">{cards}</div>'


def samples_section(run: Run) -> str:
    """Return sample pictures, and further mistakes folded away."""
    samples, mistakes = choose_samples(run.examples, run.right)

    # How frequent wrong answers are, in all and among the samples.
    total = len(run.right)
    errors = total - sum(run.right.values())
    errors_shown = 0
    for example in samples:
        if not run.right[example["id"]]:
            errors_shown += 1

    section = f"""
<h2>What it sees</h2>
<p class="dim">{len(samples)} of the {total:,} questions, drawn with a fixed seed so that every kind
appears and wrong answers are as frequent as they are: {errors} of all ({100 * errors / total:.1f}
%), {errors_shown} here. Pictures are enlarged {ZOOM} times.</p>
{question_cards(samples, run)}"""
    if mistakes:
        summary = f"<summary>{len(mistakes)} more of the wrong answers</summary>"
        section += f"\n<details>{summary}{question_cards(mistakes, run)}</details>"
    return section


# ---------------------------------------------------------------------- the rest of the page


def parts_section(run: Run) -> str:
    """Return the parameters of each part, and how many of them each stage trained."""
    head = "<th>part</th><th>parameters</th>"
    for name in run.stages:
        head += f"<th>trained in {escape(name)}</th>"

    rows = ""
    for part, count in run.parameters.items():
        row = f"<th>{escape(part)}</th><td>{count:,}</td>"
        for stage in run.stages.values():
            trained = stage.start["trainable"].get(part, 0)
            if trained:
                row += f"<td>{trained:,}</td>"
            else:
                row += '<td class="dim">frozen</td>'
        rows += f"<tr>{row}</tr>"
    return f"""
<h2>What it is made of</h2>
<table><thead><tr>{head}</tr></thead>
<tbody>{rows}</tbody></table>"""


def times_section(run: Run) -> str:
    """Return how long each stage and each evaluation took."""
    times = {}
    for name, stage in run.stages.items():
        times[f"training, {name}"] = stage.end["seconds"]
    times["evaluation"] = run.seeing.seconds
    times["evaluation, blanked"] = run.blanked.seconds

    rows = ""
    for what, seconds in times.items():
        rows += f"<tr><th>{what}</th><td>{duration(seconds)}</td></tr>"
    return f"""
<h2>Time taken</h2>
<table class="narrow"><tbody>{rows}</tbody></table>"""


def page(run: Run) -> str:
    """Return the whole page."""
    recipe = f"<pre>{escape(run.recipe)}</pre>"
    body = [
        introduction(run),
        figures(run),
        scores_section(run),
        training_section(run),
        samples_section(run),
        parts_section(run),
        times_section(run),
        f"<details><summary>The recipe, every field written out</summary>{recipe}</details>",
        f'<p class="dim">World of seed {run.facts["seed"]}. Written by '
        "<code>python -m demo.report</code> from the files of the run.</p>",
    ]
    style = Path(__file__).with_suffix(".css").read_text()
    return html_page("barellava: the demo", "\n".join(body), style)


def print_scores(run: Run):
    """Print the scores beside their controls."""
    print(f"{'':24}{'score':>8}{'blanked':>9}{'text only':>11}{'chance':>8}{'n':>7}")
    for name, score in run.seeing.scores.items():
        blank = run.blanked.scores[name]["score"]
        line = f"{name:24}{score['score']:8.1f}{blank:9.1f}"
        line += f"{score['text_only']:11.1f}{score['chance']:8.1f}{score['n']:7}"
        print(line)


def main(argv: list[str]):
    """Run the command."""
    parser = command_line.parser(__doc__)
    parser.add_argument(
        "folder",
        help="a run's folder: its log, and the answers of evaluate.py with and without --blank",
    )
    folder = Path(parser.parse_args(argv).folder)
    run = read_run(folder)
    write_file(folder / "report.html", page(run))
    print_scores(run)
    print(f"report: {folder / 'report.html'}")


if __name__ == "__main__":
    command_line.cli(main, __doc__)
