"""Noise for what strangers can send: `python -m tests.fuzz TARGET --seconds N`, with atheris; and briefly with the tests."""
