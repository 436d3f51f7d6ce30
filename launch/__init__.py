"""What to run: the recipe, the plan made of it, the records of a deployment, and the operator's commands."""
