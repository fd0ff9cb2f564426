"""One operation per file; see each file's docstring for its mathematics. Imports nothing of the project."""
