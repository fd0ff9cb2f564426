"""The demo worlds and their report."""
