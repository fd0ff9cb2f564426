"""From a row in a file to one sample."""
