"""Chapter 1: labels from the places of the answers, and a padded batch in which none is lost."""

from guide.drawings.ch01 import CONVERSATION, train_tokenizer
from guide.exercises import chosen
from inputs.templates import choose_template, render, tokenize

ch = chosen("ch01")


def test_labels_of_a_conversation():
    tok = train_tokenizer()
    for template in ("plain", "llama", "pretrain"):
        turns = CONVERSATION if template != "pretrain" else CONVERSATION[:2]
        rendered = render(turns, choose_template(template, tok))
        ids, labels, offsets = tokenize(*rendered, tok)
        assert ch.labels_of(ids, offsets, rendered.answers) == labels


def test_the_first_token_has_no_label():
    assert ch.labels_of([5, 6], [(0, 1), (1, 2)], [(0, 2)]) == [-100, 6]


def test_a_token_belongs_to_where_it_begins():
    # The token " A" begins in front of the answer "A", the last one reaches beyond it.
    ids = [7, 8, 9, 10]
    offsets = [(0, 3), (3, 5), (5, 7), (7, 10)]
    assert ch.labels_of(ids, offsets, [(4, 9)]) == [-100, -100, 9, 10]


def test_padding_is_the_end_token_and_no_end_is_lost():
    end = 2
    samples = [([5, 6, end], [-100, 6, end]), ([5, 6, end, 5, 7, 8, end], [-100] * 5 + [8, end])]
    ids, labels, mask = ch.pad_batch(samples, padding=end)
    assert ids.tolist() == [[5, 6, end, end, end, end, end], samples[1][0]]
    assert labels.tolist() == [[-100, 6, end, -100, -100, -100, -100], samples[1][1]]
    assert mask.tolist() == [[1, 1, 1, 0, 0, 0, 0], [1] * 7]
