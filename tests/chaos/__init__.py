"""Random faults under a mixed load whose every right answer is known: `python -m tests.chaos --minutes N --seed S`."""
