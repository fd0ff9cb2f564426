"""The fixture of small checkpoints, made known to the tests here."""

from tests.tools.run_checkpoints import two  # noqa: F401
