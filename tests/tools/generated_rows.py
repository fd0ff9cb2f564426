"""Questions with answers as models write them, for the metrics of evals/row_files.py.

Each function yields so many (true answers or letter, answer), the same in every run: the true one
in other case, between other spaces, with units, per cent and commas, in sentences, with letters
changed, and answers to other questions.
"""

from tests.tools.generated_answers import Draw

NUMBERS = """
    14 0.57 3 62 1.216666667 0 0.0 -0 00 5% 0.05 100% % 5%% -3 +7 1,541 1541 2014 977633 .5 5. 1e3
    1e-400 inf nan -inf infinity 1_000 ５ ½ 33% 0% 3.0238 1:2 $40 40.7M 0x10 99.99 1.05 20 0.95 105
    95
""".split()
TEXTS = [
    "No", "Yes", "Inspired", "green line", "Over 30 mins", "Democrat (scores 60 to 100)", "U.S.",
    "[Yes, No]", "Rep/Lean Rep", "18 to 24 years", "the\nred line", "South Korea (2014)",
    "Poll workers in your community", "more than 6 tablets\na day", "ITC Limited",
    "Straße", "İstanbul", "ΣΊΣΥΦΟΣ", "naïve café",
    "1/8/93", "$40.7 million", "T.F. Riehl", "東京タワー", "R. J. Reynolds  Tobacco", "a", "the",
    "Ｆｕｌｌ　Ｗｉｄｔｈ", "CENTRE", "ﬁnal", "line\nbreak", "x" * 60, "18,000 meters",
    "B", "b.", "...",
]  # fmt: skip
FORMULAS = [
    "y _ { 2 } = - 1\n", "x_1 = \\frac { - 2 + 2 \\sqrt { 2 } } { 2 }\n", "V = 7 . 6 N",
    "\\alpha + \\Beta", "A\nB", "a ^ { 2 } + b ^ { 2 } = c ^ { 2 }", "\t1 2 3\t", "X x",
]  # fmt: skip
SENTENCES = [
    "The answer is {}.", "the answer is {}", "It is {}", "{} is what it says", "Answer: {}",
    "about {}", "{}.", "{},", "({})", "'{}'", "I can not read it, but maybe\n{}\n", "{} {}",
    "There is a long description of the whole picture before the answer {} and one after it, too.",
]  # fmt: skip
FACTORS = (1, 1.05, 1.0500001, 0.95, 0.9499999, 0.5, 100, 0.01, -1, 1.049, 0.951, 2)


def numbers_and_texts(count=3000):
    """Yield ([true answer], answer) as ChartQA has them."""
    draw = Draw(21)
    for _ in range(count):
        truth = draw(NUMBERS) if draw.random() < 0.7 else draw(TEXTS)
        yield [truth], varied(draw, in_other_numbers(draw, truth))


def in_other_numbers(draw, truth):
    """Return a truth times a factor, if it is a number and by chance; also as per cent."""
    try:
        value = float(truth.rstrip("%")) * draw(FACTORS)
    except ValueError:
        return truth
    if draw.random() < 0.3:
        return truth
    return draw(["{:g}", "{:.9g}", "{:.2f}", "{:,.1f}", "{:g}%", "{:.0f} %", "{:e}"]).format(value)


def texts(count=3000):
    """Yield (true answers, answer) as DocVQA has them."""
    draw = Draw(22)
    for _ in range(count):
        truths = [draw(TEXTS + NUMBERS) for _ in range(1 + draw.upto(2))]
        if draw.random() < 0.2:
            truths += [truths[0].upper(), f" {truths[0]}  "]
        if draw.random() < 0.02:
            truths[-1] = ""
        yield truths, varied(draw, draw(truths))


def written(formula, count=1000):
    """Yield (true answers, answer) as OCRBench has them."""
    draw = Draw(23 + formula)
    for _ in range(count):
        truths = [draw(FORMULAS if formula else TEXTS + NUMBERS) for _ in range(1 + draw.upto(1))]
        yield truths, varied(draw, draw(truths))


def letters(count=3000):
    """Yield (letter, answer) as multiple choice has them."""
    draw = Draw(25)
    phrases = [
        "{}", "{}", "{}", "{}.", "{}.", "({})", "{}:", "({}", "{})", " {}", "{}. a dog",
        "{}: a dog",
        "{}. It is", "{}.\n{}", "{} dog", "{}dog", "Option {}", "option {}", "Option  {}", "[{}]",
        "OPTION {}.", "option: {}", "the answer is {}", "The answer is {}.", "The answer is ({}).",
        "Answer: {}", "The correct answer is {}", "**{}**", "A dog, so {}", "{},B", "\n{}.", "\t{}",
        "{}\nBecause", "'{}'", '"{}"', "{}.{}", "The answer is  {}", "the answer is ", "option ",
        "(", "", " ", "{}。", "（{}）", "{}!", "<{}>",
    ]  # fmt: skip
    for _ in range(count):
        letter = draw("ABCD")
        said = letter if draw.random() < 0.7 else draw("ABCDEZabcdé1")
        if draw.random() < 0.2:
            said = said.lower()
        text = draw(phrases).format(said, draw("ABCD"))
        yield letter, draw([text, text, text, text.upper(), text + "\n", " " + text, text + " "])


def varied(draw, text):
    """Return a text as a model may write it."""
    if draw.random() < 0.05:
        return draw(["", " ", "\n", "unanswerable", "x" * 500, *TEXTS, *NUMBERS])
    if draw.random() < 0.3:
        text = draw([text.upper(), text.lower(), text.title(), text.swapcase()])
    if draw.random() < 0.3:
        text = misspelt(draw, text)
    if draw.random() < 0.35:
        text = text.replace(draw(" \n"), draw(["", " ", "  ", "\n", "\n", "\t", "\u00a0"]))
    if draw.random() < 0.25:
        text = draw(SENTENCES).format(text, text)
    if draw.random() < 0.15:
        text += draw([" ", "\n", "%", " %", " million", "0", ".0", "  \t"])
    return text


def misspelt(draw, text):
    """Return a text with a few letters put in, taken out or changed."""
    for _ in range(1 + draw.upto(3)):
        at = draw.upto(len(text))
        text = text[:at] + draw(["", "x", "é", " ", "7"]) + text[at + draw.upto(1) :]
    return text
