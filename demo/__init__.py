"""Small worlds of coloured shapes to train on in minutes, and the report of a run.

Read scenes.py (what is in a picture), questions.py (what is said about it), world.py (the files of
the data set), then moving.py (the same with time in it) and report.py.
"""
