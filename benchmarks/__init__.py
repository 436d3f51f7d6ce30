"""Measurements; each prints its figures and its bar, none is a test."""
