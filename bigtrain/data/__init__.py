"""Token files, the default corpus, datasets of the user's, and the deterministic cursor."""
