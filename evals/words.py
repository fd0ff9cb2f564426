"""Words of a caption, as the published scorers of hallucination read them.

    tagged(["Two dogs ran"])        # [[("Two", "CD"), ("dogs", "NNS"), ("ran", "VBD")]]
    lemma("dogs", "n")              # "dog"
    similarity("street", "road")    # the cosine of two word vectors

The tokens, the parts of speech (of the Penn Treebank) and WordNet's lemmas are nltk's, the vectors
are those of spaCy's en_core_web_lg. The project needs neither package otherwise, and both have data
that pip does not install: `check` says in one line what is missing and which command brings it.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings

from config import UserError

NLTK_DATA = "punkt_tab averaged_perceptron_tagger_eng wordnet"
VECTORS = "en_core_web_lg"

# The parts of spaCy's model that are not needed for its vectors.
PIPES = ("tok2vec", "tagger", "parser", "senter", "attribute_ruler", "lemmatizer", "ner")


def check(vectors: bool = False):
    """Raise UserError if nltk, or spaCy for `vectors`, or their data are not installed."""
    _nltk()
    if vectors:
        _spacy()


def tagged(texts: list[str]) -> list[list[tuple[str, str]]]:
    """Return for each text its tokens, each with its part of speech. Raise UserError."""
    nltk = _nltk()
    return nltk.pos_tag_sents([nltk.word_tokenize(text) for text in texts])


@functools.lru_cache(maxsize=100_000)
def lemma(word: str, pos: str) -> str:
    """Return WordNet's base form of a word, or the word if WordNet does not have it.

    pos: "n", "v", "a" or "r", for a noun, a verb, an adjective or an adverb.
    """
    return _nltk().WordNetLemmatizer().lemmatize(word, pos)


@functools.lru_cache(maxsize=1_000_000)
def similarity(first: str, second: str) -> float:
    """Return the cosine of the vectors of two words; 1 for the same word, 0 for an unknown one."""
    # spaCy warns of words without a vector.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return _document(first).similarity(_document(second))


@functools.lru_cache(maxsize=100_000)
def _document(word: str):
    return _vectors().make_doc(word)


@functools.cache
def _nltk():
    """Return nltk. Raise UserError if it or its data are not installed."""
    try:
        import nltk
    except ModuleNotFoundError:
        what = "reads the words of captions, not installed"
        raise UserError("nltk", what, "pip install nltk") from None

    # nltk itself knows best where its data may lie.
    try:
        nltk.pos_tag(nltk.word_tokenize("Two dogs."))
        nltk.WordNetLemmatizer().lemmatize("dogs")
    except LookupError:
        what = f"not all of its data are installed: {NLTK_DATA}"
        raise UserError("nltk", what, f"python -m nltk.downloader {NLTK_DATA}") from None
    return nltk


@functools.cache
def _spacy():
    """Return spaCy. Raise UserError if it or the model with the vectors is not installed."""
    try:
        import spacy
    except ModuleNotFoundError:
        what = "has the vectors of words, not installed"
        raise UserError("spacy", what, "pip install spacy") from None

    if importlib.util.find_spec(VECTORS) is None:
        what = f"its model {VECTORS} is not installed"
        raise UserError("spacy", what, f"python -m spacy download {VECTORS}")
    return spacy


@functools.cache
def _vectors():
    """Return spaCy's model with its vectors, and without the networks."""
    return _spacy().load(VECTORS, exclude=PIPES)
