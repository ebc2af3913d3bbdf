"""One run of a recipe: from its data to a trained, measured and saved mixture, and going on with it."""
