"""How soon deaths are noticed, and how soon what died is back."""
