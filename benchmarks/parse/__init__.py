"""Ranks by prompt: how good and how fast routed models are."""
