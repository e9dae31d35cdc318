"""The tuner: what PEFT sees of JACTUS."""
