"""``python -m peft_jactus`` is the command ``peft-jactus``."""

from peft_jactus_cli import app

app(prog_name="peft-jactus")
