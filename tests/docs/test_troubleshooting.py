"""The troubleshooting page has an entry for every message of the package, and none for a message that is gone."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

import peft_jactus
from tests.docs.messages import FILLED_IN, messages, messages_of

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
# Messages of other projects, which somebody meets because of this one.
FOREIGN = {
    "KeyError: 'JACTUS'",
    "Unknown quantization type, got jactus",
    "Unknown quantization method: jactus",
    "terminate called without an active exception",
}
# What only passes a message on, which is found where it is made.
PASSED_ON = {
    ("_placeholders.py", "mine._complaint"),
    ("target_checks.py", "'\\n'.join((f'{name} {refusal.reason}' for name, refusal in refusals.items()))"),
    ("targeting.py", "message"),
}
LEAST_LENGTH = 12  # of a quotation, so that it says which message is meant


@dataclass(frozen=True)
class Entry:
    quotations: tuple[str, ...]
    cause: str
    remedy: str


def entries_of(page):
    """Return the entries of a page: a line with a quotation, perhaps others, the cause, the remedy."""
    found = []
    for block in re.split(r"\n{2,}", page):
        term, *definitions = re.split(r"\n: ", block.strip())
        if definitions and term.startswith("`"):
            others = definitions.pop(0) if definitions[0].startswith("or: ") else ""
            quoted = [plain(match[2]) for match in re.finditer(r"(`+)(.+?)\1(?!`)", f"{term}\n{others}", re.DOTALL)]
            cause, remedy = definitions
            found.append(Entry(tuple(quoted), cause, remedy))
    return found


def plain(text):
    """Return a text without backticks and line breaks, as `messages` does."""
    return " ".join(text.replace("`", "").split())


def is_passed_on(message):
    """Whether a message only puts a name before another one."""
    fixed = message.text.replace(FILLED_IN, " ")
    return (message.place.partition(":")[0], message.expression) in PASSED_ON or (
        FILLED_IN in message.text and len(re.findall(r"[\w.]{2,}", fixed)) < 3
    )


def missing_from(entries, found):
    """Return the messages that no entry quotes."""
    quotations = [quotation for entry in entries for quotation in entry.quotations]
    return [
        message
        for message in found
        if not is_passed_on(message) and not any(quotation in message.text for quotation in quotations)
    ]


ENTRIES = entries_of(PAGE.read_text(encoding="utf-8"))


def test_every_message_has_an_entry():
    missing = missing_from(ENTRIES, messages())
    assert not missing, "\n".join(f"{message.place}: {message.text or message.expression}" for message in missing)


def test_every_entry_is_of_a_message_that_exists():
    texts = [message.text for message in messages()]
    quotations = {quotation for entry in ENTRIES for quotation in entry.quotations}
    assert {each for each in quotations if not any(each in text for text in texts)} == FOREIGN


def test_every_entry_has_a_cause_and_a_remedy_and_says_which_message_it_means():
    assert len(ENTRIES) > 100
    for entry in ENTRIES:
        assert entry.cause.endswith("."), entry
        assert re.fullmatch(r"\*\*Do:\*\* .+\.", entry.remedy, re.DOTALL), entry
        assert min(map(len, entry.quotations)) >= LEAST_LENGTH, entry


@pytest.mark.parametrize("name", [name for name in peft_jactus.__all__ if name.endswith(("Error", "Warning"))])
def test_every_class_of_errors_is_named(name):
    assert f"`{name}`" in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "source",
    [
        "raise ValueError('The moon is not in the right place.')",
        "raise ValueError(f'{name}: the moon is not in the right place of {place}.')",
        "warnings.warn(f'The moon is {state}, and not in the right place.', stacklevel=2)",
        "def check(moon):\n    text = f'{moon} is not in the right place.'\n    raise ValueError(text)",
        "def check(moon):\n    raise ValueError(_text(moon))\ndef _text(moon):\n    return f'{moon} is no moon.'",
        "def check(moon, text):\n    raise ValueError(text)",  # not to be read: that is reported, too
    ],
    ids=["literal", "f-string", "warning", "variable", "function", "argument"],
)
def test_a_message_without_an_entry_is_reported(source):
    assert len(missing_from(ENTRIES, messages_of(source))) == 1


def test_how_many_messages_there_are():
    found = [message for message in messages() if not is_passed_on(message)]
    assert len(found) > 250  # or the walk over the package has become blind
