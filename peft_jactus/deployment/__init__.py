"""What is shipped: compressed checkpoints, how they are written and loaded."""
