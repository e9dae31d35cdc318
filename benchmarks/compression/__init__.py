"""What compression costs before any training, what it takes, and what is shipped."""
