"""The method's mathematics: tensors in, tensors out."""
