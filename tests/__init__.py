"""Tests of peft_jactus: one module per property or per module of the package."""
