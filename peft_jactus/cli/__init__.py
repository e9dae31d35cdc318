"""What the commands of ``peft-jactus`` do: a module for each, and what they share.

Their options are in `peft_jactus_cli`, which is imported without this package.
"""
