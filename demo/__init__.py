"""Small worlds of coloured shapes to train on in minutes, and the report of a run.

Read scenes.py (what is in a picture), questions.py (what is said about it) and world.py (the files
of the data set), then moving.py (the same with time in it). For the report of a run, read
results.py (what it shows) and report.py (how it is drawn).
"""
