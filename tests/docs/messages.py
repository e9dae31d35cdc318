"""The errors and warnings of the package, from its source: what is fixed in the text of each.

What is filled in at run time is written as ``…``; backticks are left out. A message that stands in a variable, or
comes from a function, is followed to the texts in its own module.
"""

import ast
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILLED_IN = "…"
# Calls that have a message among their arguments, and where; `raise` is another one.
CALLS = {
    "warnings.warn": 0,
    "logger.warning": 0,
    "log_once": 0,
    "Refusal": 0,  # raised, or logged, by somebody else
    "WeightPlaceholder.of": 2,  # raised when its numbers are read
}
# Attributes and dicts that hold what is raised or logged elsewhere.
HELD = {"reasons", "uses", "weight_is_hidden"}
# Raised by a class that makes the whole message of it.
FREED = "BaseWeightsFreedError"
NOT_FOR_USERS = {"typer.Exit"}


@dataclass(frozen=True)
class Message:
    """One text.

    Attributes:
        place: File and line.
        text: With `FILLED_IN` for what is not fixed; empty if it could not be read.
        expression: The code that it stands in.
    """

    place: str
    text: str
    expression: str


def paths():
    return [ROOT / "peft_jactus_cli.py", *sorted((ROOT / "peft_jactus").rglob("*.py"))]


def messages():
    """Return all messages of the package."""
    return [message for path in paths() for message in messages_of(path.read_text(encoding="utf-8"), path.name)]


def messages_of(source, name="module.py"):
    """Return the messages of one module."""
    module = _Module(ast.parse(source))
    return [
        Message(f"{name}:{argument.lineno}", module.whole(argument, text), ast.unparse(argument))
        for argument in module.arguments()
        for text in module.texts(argument) or [""]
    ]


class _Module:
    def __init__(self, tree):
        self.tree = tree
        self.parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}

    def arguments(self):
        """Yield the expressions that become messages."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                if ast.unparse(node.exc.func) not in NOT_FOR_USERS:
                    yield node.exc.args[0]
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in CALLS:
                yield node.args[CALLS[ast.unparse(node.func)]]
            elif isinstance(node, ast.Assign) and held_in(node.targets[0]) in HELD and is_text(node.value):
                yield node.value

    def whole(self, argument, text):
        """Return the message that an argument leads to."""
        call = self.parents[argument]
        is_freed = isinstance(call, ast.Call) and ast.unparse(call.func) == FREED
        whole = f"Cannot {text}: the dense weights were freed." if is_freed else text
        return " ".join(whole.replace("`", "").split())

    def texts(self, expression):
        """Return all texts that an expression can be."""
        if isinstance(expression, ast.Constant | ast.JoinedStr):
            return [fixed_text(expression)]
        if isinstance(expression, ast.BinOp):
            return [fixed_text(expression)]
        if isinstance(expression, ast.IfExp):
            return self.texts(expression.body) + self.texts(expression.orelse)
        if isinstance(expression, ast.Name):
            return [text for value in self.values_of(expression) for text in self.texts(value)]
        if isinstance(expression, ast.Call) and isinstance(expression.func, ast.Name):
            return [text for value in self.returned_by(expression.func.id) for text in self.texts(value)]
        return []

    def values_of(self, name):
        """Yield what is assigned to a name in its function, or else in the module."""
        scope = self.parents[name]
        while not isinstance(scope, ast.FunctionDef | ast.Module):
            scope = self.parents[scope]
        for inside in (scope, self.tree):
            found = [
                node.value
                for node in ast.walk(inside)
                if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name.id]
            ]
            if found:
                return found
        return []

    def returned_by(self, name):
        functions = [n for n in self.tree.body if isinstance(n, ast.FunctionDef) and n.name == name]
        return [n.value for function in functions for n in ast.walk(function) if isinstance(n, ast.Return) and n.value]


def held_in(target):
    """Return the name of what is assigned to, or into."""
    return ast.unparse(target.value if isinstance(target, ast.Subscript) else target).rpartition(".")[2]


def is_text(expression):
    return not isinstance(expression, ast.Dict | ast.DictComp)


def fixed_text(expression):
    """Return a literal or f-string with `FILLED_IN` for what is filled in."""
    if isinstance(expression, ast.Constant):
        return str(expression.value)
    if isinstance(expression, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else FILLED_IN for part in expression.values)
    if isinstance(expression, ast.BinOp):
        return fixed_text(expression.left) + fixed_text(expression.right)
    return FILLED_IN
