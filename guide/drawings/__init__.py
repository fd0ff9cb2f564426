"""The figures of the guide. chNN.py draws those of one chapter, from tensors that it computes.

Each has a table FIGURES = {"NN-what.svg": function}; a function returns the text of an SVG picture,
made with the primitives of svg.py. guide/figures.py writes them.
"""
