"""Every model type that transformers knows, tiny and random: compressed, exported, loaded again."""
