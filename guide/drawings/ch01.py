"""Chapter 1: the tokens of a conversation with their labels, and the same labels gone wrong."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from guide.drawings.svg import BLUE, GREEN, GREY, ORANGE, figure, rectangle, text, tokens
from inputs.templates import choose_template, render, tokenize
from inputs.tokenizer import JsonTokenizer
from packing import IGNORE, IMAGE_TOKEN

# All that the small tokenizer has ever read.
CORPUS = [
    "USER: What colour is it? ASSISTANT: It is red.",
    "USER: What shape is it? ASSISTANT: A circle.",
    "USER: Is it blue or red? ASSISTANT: blue",
    "USER: Is it a square or a circle? ASSISTANT: square",
]

CONVERSATION = [
    {"from": "human", "value": "<image>\nWhat colour is it?"},
    {"from": "gpt", "value": "red"},
    {"from": "human", "value": "Is it a circle?"},
    {"from": "gpt", "value": "It is a square."},
]


def train_tokenizer() -> JsonTokenizer:
    """Return a byte-level BPE of 400 tokens whose end of sequence is </s>."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tok.train_from_iterator(CORPUS * 10, trainer)
    settings = b'{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}'
    return JsonTokenizer(
        {"tokenizer.json": tok.to_str().encode(), "tokenizer_config.json": settings}
    )


def shown(piece: str) -> str:
    """Return a token's characters with its spaces and line breaks to be seen."""
    return piece.replace(" ", "·").replace("\n", "⏎")


def labelled_tokens() -> str:
    """Draw the conversation token by token, with each label below its token."""
    tok = train_tokenizer()
    rendered = render(CONVERSATION, choose_template("plain", tok))
    ids, labels, offsets = tokenize(*rendered, tok)

    words = []
    colours = []
    below = []
    for token, label, (start, end) in zip(ids, labels, offsets, strict=True):
        words.append(shown(rendered.text[start:end]))
        colour = GREY
        if token == IMAGE_TOKEN:
            colour = GREEN
        elif label != IGNORE:
            colour = ORANGE
        colours.append(colour)
        below.append("–" if label == IGNORE else str(label))

    body = text(20, 32, "tokens, and below each its label (– is -100: not learned)", 13, GREY)
    body += tokens(20, 46, words, colours, below)
    title = (
        "A conversation of four turns as tokens: those of the answers and their ends have labels."
    )
    return figure(720, 148, body, title)


# Which tokens of the second answer have a label, by how the labels were made.
FAULTS = (
    ("right", "an answer and its end", ()),
    ("turns tokenized apart", "the first token of the answer is lost", (0,)),
    ("padding is the end token", "the end is lost: it never stops", (-1,)),
    ("question too", "most of the loss is about questions", None),
)


def faults() -> str:
    """Draw the last two turns with the labels that four ways of making them give."""
    tok = train_tokenizer()
    last_two = CONVERSATION[2:]
    rendered = render(last_two, choose_template("plain", tok))
    ids, labels, offsets = tokenize(*rendered, tok)
    learned = [i for i, label in enumerate(labels) if label != IGNORE]

    body = ""
    for row, (name, what, lost) in enumerate(FAULTS):
        top = 20 + row * 66
        body += text(20, top + 14, name, 14, bold=True)
        body += text(264, top + 14, what, 13, GREY)

        # None: everything is labelled. Else: all of the answer but these of its tokens.
        labelled = set(range(1, len(ids)))
        if lost is not None:
            labelled = set(learned) - {learned[i] for i in lost}
        at = 20
        for i, (start, end) in enumerate(offsets):
            word = shown(rendered.text[start:end])
            width = len(word) * 7.6 + 10
            fill = "#ffffff"
            if i in labelled:
                fill = "#fbe8d6"
            stroke = ORANGE if i in labelled else GREY
            if i in learned and i not in labelled:
                stroke = BLUE
            body += rectangle(at, top + 22, width - 3, 22, fill, stroke, 3)
            body += text(at + (width - 3) / 2, top + 37, word, 12, anchor="middle", mono=True)
            at += width
    title = "The tokens of two turns, with the labels that four ways of making them give."
    return figure(720, 290, body, title)


FIGURES = {"01-labels.svg": labelled_tokens, "01-faults.svg": faults}
