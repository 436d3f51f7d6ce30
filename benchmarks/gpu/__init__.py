"""Measurements on a machine with NVIDIA GPUs."""
