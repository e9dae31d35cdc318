"""One type: built, taken through the journey, with other settings after a refusal; what became of it."""

import time

from benchmarks.model_types.building import CannotBuildError, ComponentError, build, first_line
from benchmarks.model_types.journey import (
    DifferenceError,
    Settings,
    UnstableError,
    check_dense,
    is_refusal,
    travel,
    where,
)

# In this order in the summary.
OUTCOMES = {
    "passed": "exported and loaded, with the same tensors and outputs",
    "setting": "the same, with a setting",
    "unstable": "loaded with the same tensors; a millionth of its weights changes the dense model's outputs, too",
    "refused": "refused by this package, with a message",
    "failed": "failed with an error before anything was exported",
    "unloadable": "exported, and does not load",
    "silent": "exported or loaded with other values, without a word",
    "transformers": "the dense checkpoint does not load with the same values either",
    "unbuilt": "no tiny model could be made that takes an input",
    "component": "a part of other models, without an Auto class of its own",
}
UNSOUND = ("unloadable", "silent")


def measure(model_type, enter):
    """Return the record of a type.

    Args:
        model_type: Its name.
        enter: Called with the name of each stage.
    """
    started = time.perf_counter()
    enter("build")
    try:
        built = build(model_type)
    except CannotBuildError as error:
        outcome = "component" if isinstance(error, ComponentError) else "unbuilt"
        return {"type": model_type, "outcome": outcome, "reason": str(error)}
    record = {
        "type": model_type,
        "class": built.model_class.__name__,
        "auto_class": built.auto.__name__,
        "recipe": built.recipe,
        "inputs": sorted(built.batch),
        "loss": "its own" if built.has_own_loss else "mean square of its outputs",
    }
    record |= journeys(built, enter)
    return record | {"seconds": round(time.perf_counter() - started, 1)}


def journeys(built, enter):
    """Return the outcome of the first journey that ends well; else of the first one."""
    first, then = None, {}
    for settings in LADDER:
        outcome = journey(built, settings, enter)
        if first is None:
            first = outcome
        else:
            then[", ".join(settings.describe())] = outcome.get("reason")
        if outcome["outcome"] == "passed" and settings.leave_unusable_dense:
            outcome = and_the_others(outcome, journey(built, Settings(without_data=True), enter))
        if outcome["outcome"] in UNSOUND:
            return or_of_transformers(outcome, check_dense(built))
        if outcome["outcome"] == "unstable":
            return outcome
        if outcome["outcome"] == "passed":
            said = settings.describe()
            return outcome | ({"outcome": "setting", "settings": said, "without_it": first["reason"]} if said else {})
    return first | {"then": then}


def or_of_transformers(outcome, dense):
    """Return an outcome that is transformers' own if the dense checkpoint loses the very same: ``dense``, in words."""
    if dense is None:
        return outcome
    same = dense in (outcome["reason"], f"{DifferenceError.__name__}: {first_line(outcome['reason'])}")
    return outcome | {"dense": dense} | ({"outcome": "transformers"} if same else {})


LADDER = (Settings(), Settings(leave_unusable_dense=True), Settings(without_data=True))


def and_the_others(outcome, without_data):
    """Return an outcome that counts the layers which the loss does not reach, compressed without data, too."""
    if without_data["outcome"] in UNSOUND:
        return without_data
    reached = without_data["outcome"] == "passed"
    return outcome | {"layers_without_data": without_data["layers"] if reached else without_data["reason"]}


def journey(built, settings, enter):
    stage = "build"

    def entered(name):
        nonlocal stage
        stage = name
        enter(name)

    try:
        return {"outcome": "passed", **travel(built, settings, entered)}
    except UnstableError as error:
        return {"outcome": "unstable", "stage": stage, "reason": str(error), **error.figures}
    except DifferenceError as error:
        return {"outcome": "silent", "stage": stage, "reason": str(error)}
    except Exception as error:  # noqa: BLE001  # whatever models' code raises is an outcome
        reason = f"{type(error).__name__}: {first_line(error)}"
        if stage.startswith("load"):
            return {"outcome": "unloadable", "stage": stage, "reason": reason, "at": where(error)}
        outcome = "refused" if is_refusal(error) else "failed"
        return {"outcome": outcome, "stage": stage, "reason": reason, "at": where(error)}
