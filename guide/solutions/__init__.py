"""The solutions of the exercises. Try first."""
