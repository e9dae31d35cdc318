"""Make the small models that the studies start from."""
