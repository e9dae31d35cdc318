"""The fields of `JactusConfig` on the site, from the same help texts as its docstring.

``{config-fields} Budget`` writes the fields of a group. In the API reference the class's docstring ends where its
fields begin, since they have a page of their own.
"""

import inspect

from sphinx.util.docutils import SphinxDirective

from peft_jactus import JactusConfig
from peft_jactus.tuner.config_reference import GROUPS, described_fields


class ConfigFields(SphinxDirective):
    """Write the fields of the group that the argument names."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self):
        """Return the nodes of a definition list."""
        self.env.note_dependency(inspect.getfile(JactusConfig))
        fields = described_fields(JactusConfig)
        lines = []
        for name in GROUPS[self.arguments[0]]:
            about = fields[name]
            default = f", default `{about.default}`" if about.default is not None else ""
            lines += [f"(config-{name})=", "", f"`{name}`: `{about.type}`{default}", f": {about.help}", ""]
        return self.parse_text_to_nodes("\n".join(lines))


def leave_out_fields(app, what, name, obj, options, lines):
    """Cut the fields off the docstring of the config."""
    del app, what, name, options
    if obj is JactusConfig:
        first = next(f"{group}:" for group in GROUPS)
        del lines[lines.index(first) :]
        lines += ["Its fields: :doc:`/config`.", ""]


def setup(app):
    """Register the directive, and what shortens the docstring (before napoleon reads it)."""
    app.add_directive("config-fields", ConfigFields)
    app.connect("autodoc-process-docstring", leave_out_fields, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
