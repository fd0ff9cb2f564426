"""From a file to a parameter and back."""
