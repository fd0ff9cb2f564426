"""One benchmark per file: examples, score, chance. `evaluate.py` says what such a file offers."""
