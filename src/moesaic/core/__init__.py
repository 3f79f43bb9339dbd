"""Floor 0: what every other folder speaks. Imports nothing of ours."""
