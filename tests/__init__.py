"""Tests; the folders mirror the packages, `tests/system` launches whole deployments."""
