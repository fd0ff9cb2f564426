"""How VQAv2 and TextVQA read an answer: the official normalisations and the accuracy over ten human answers.

`official` is VQA's vqaEval.py, `m4c` the EvalAI processor of M4C that LLaVA uses for TextVQA and to write VQAv2's
server file. Their habits are kept: a comma between digits lets all punctuation vanish without a space, at most 32
periods go (a flag stands where the count belongs), a period goes unless a digit follows.
"""

import re

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = "zero one two three four five six seven eight nine ten".split()
NUMBERS = {"none": "0", **{word: str(i) for i, word in enumerate(NUMBERS)}}
ARTICLES = {"a", "an", "the"}
# A word that has lost one of its apostrophes gets it back. let's and she's are not on the official list.
WORDS = """'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've
    mustn't needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've""".split()
CONTRACTIONS = {
    word[: m.start()] + word[m.end() :]: word for word in WORDS for m in re.finditer("'", word)
}
CONTRACTIONS["somebody'd"] = "somebodyd"  # this way round in the official list


def official(text):
    """An answer as VQA's own scorer compares it."""
    out = text = spaced(text)
    for mark in PUNCTUATION:
        alone = f"{mark} " in text or f" {mark}" in text or re.search(r"\d,\d", text)
        out = out.replace(mark, "" if alone else " ")
    out = re.sub(r"\.(?!\d)", "", out, count=32)
    words = (NUMBERS.get(word, word) for word in out.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def m4c(text):
    """An answer as M4C's EvalAI processor has it."""
    return official(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())


def soft(answer, humans):
    """Mean over the humans of min(1, agreeing others / 3): the accuracy of VQA and TextVQA, 0..1."""
    agree = humans.count(answer)
    return sum(min(1, (agree - (human == answer)) / 3) for human in humans) / len(humans)


def credits(humans):
    """{answer: accuracy} of all answers that earn any."""
    return {answer: soft(answer, humans) for answer in set(humans)}


def prepared(humans):
    """(how VQA's scorer normalises an answer here, the human answers normalised so). Only where the humans differ
    does it normalise more than space: ten times yes makes Yes wrong."""
    humans = [spaced(text) for text in humans]
    return (
        (spaced, humans)
        if len(set(humans)) == 1
        else (official, [official(text) for text in humans])
    )


def spaced(text):
    return text.replace("\n", " ").replace("\t", " ").strip()
