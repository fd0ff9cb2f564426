"""Comparisons of many trainings that can be trusted; grid.py says what a grid is."""
