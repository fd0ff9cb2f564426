"""Chapter 8, does it see? Fill in both functions, then run

python -m pytest guide/exercises/test_ch08.py -o addopts=""
"""


def chair(described: list[list[str]], present: list[set[str]]) -> dict[str, float]:
    """Return CHAIR (Rohrbach et al., 2018) of some descriptions, in percent.

    described: for each picture the objects that its description names, in order
    present: for each picture the objects that are there

    The keys of the result:
        CHAIRi    of all objects that are named, how many are not there. An object that one
                  description names twice counts twice
        CHAIRs    of all descriptions, how many name an object that is not there
        recall    of all objects that are there, how many their description names
    """
    raise NotImplementedError


def blind_accuracy(seen: list[tuple[str, str]], asked: list[tuple[str, str]]) -> float:
    """Return the share of right answers, 0 to 1, of a program that sees no pictures.

    seen: (question, answer) of the training rows
    asked: (question, answer) of the test

    It gives the answer that was most frequent for this very question in training; of several that
    were equally frequent, the first in the alphabet. To a question that it has never seen it has no
    answer, which is wrong.
    """
    raise NotImplementedError
