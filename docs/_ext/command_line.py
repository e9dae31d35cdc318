"""``{command-line}``: the commands of ``peft-jactus`` with their options, from the command itself."""

import inspect
import re
from typing import get_args

from sphinx.util.docutils import SphinxDirective

import peft_jactus_cli
from peft_jactus import JactusConfig


def lines_of(command):
    """Yield the Markdown of a command."""
    name = command.__name__
    arguments, options = [], []
    for parameter in inspect.signature(command).parameters.values():
        about = get_args(parameter.annotation)[1]
        if parameter.default is inspect.Parameter.empty:
            arguments.append((parameter.name.upper(), about.help, ""))
        else:
            flag = (about.param_decls or [f"--{parameter.name.replace('_', '-')}"])[0]
            default = "" if parameter.default in (None, False) else f" Default: `{parameter.default}`."
            options.append((flag, about.help, default))
    yield from (f"(command-{name})=", "", f"## peft-jactus {name}", "", with_options(inspect.getdoc(command)), "")
    yield from (
        "```console",
        " ".join(("$ peft-jactus", name, *(name for name, *_ in arguments), "[OPTIONS]")),
        "```",
        "",
    )
    for name, text, default in (*arguments, *options):
        yield from (f"`{name}`", f": {with_options(text)}{default}", "")


def with_options(text):
    """Return a text in which options are code."""
    return re.sub(r"--[a-z][a-z-]+", r"`\g<0>`", text)


class CommandLine(SphinxDirective):
    """Write all commands."""

    def run(self):
        """Return a section for each command."""
        self.env.note_dependency(peft_jactus_cli.__file__)
        self.env.note_dependency(inspect.getfile(JactusConfig))
        commands = [each.callback for each in peft_jactus_cli.app.registered_commands]
        text = "\n".join(line for command in commands for line in lines_of(command))
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def setup(app):
    """Register the directive."""
    app.add_directive("command-line", CommandLine)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
