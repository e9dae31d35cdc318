"""Statistics of several processes, added up."""

from __future__ import annotations

from peft_jactus._processes import gather_objects, num_processes, summed
from peft_jactus.calibration.statistics import CalibrationStatistics
from peft_jactus.numerics.moments import LayerStatistics, SecondMoment
from peft_jactus.numerics.sketches import GradientSketch


def summed_over_processes(statistics: CalibrationStatistics) -> CalibrationStatistics:
    """Return the statistics of what all processes saw together.

    Raises:
        ValueError: If processes have statistics of different layers.
    """
    if num_processes() == 1:
        return statistics
    if any(names != list(statistics) for names in gather_objects(list(statistics))):
        raise ValueError("Processes calibrate different layers; give all of them the same model and config.")
    layers = list(statistics.values())
    inputs = _summed_moments([layer.input for layer in layers])
    gradients = _summed_moments([layer.gradient for layer in layers])
    row_fishers = [None if layer.row_fisher is None else summed(layer.row_fisher) for layer in layers]
    sketches = [_summed_sketch(layer.weight_gradient) for layer in layers]
    total = map(LayerStatistics, inputs, gradients, row_fishers, sketches)
    batches, terms = zip(*gather_objects((statistics.num_batches, statistics.num_loss_terms)), strict=True)
    return CalibrationStatistics(
        dict(zip(statistics, total, strict=True)),
        num_batches=sum(batches),
        num_loss_terms=None if None in terms else sum(terms),
    )


def _summed_sketch(sketch: GradientSketch | None) -> GradientSketch | None:
    return None if sketch is None else GradientSketch(summed(sketch.left), summed(sketch.right))


def _summed_moments(moments: list[SecondMoment]) -> list[SecondMoment]:
    first = {moment.identity: number for number, moment in reversed(list(enumerate(moments)))}
    # Layers share one where they do so in every process: a process may have seen no token of an expert.
    keys = list(zip(*gather_objects([first[moment.identity] for moment in moments]), strict=True))
    counts = [sum(of_all) for of_all in zip(*gather_objects([moment.num_tokens for moment in moments]), strict=True)]
    found: dict[tuple[int, ...], SecondMoment] = {}
    for key, moment, count in zip(keys, moments, counts, strict=True):
        if key not in found:
            found[key] = _summed_moment(moment, count)
    return [found[key] for key in keys]


def _summed_moment(moment: SecondMoment, count: int) -> SecondMoment:
    """Return the sum over processes, which saw ``count`` vectors; each adds what it saw around the mean of all."""
    mean = summed(moment.mean * (moment.num_tokens / max(1, count)))
    return SecondMoment(
        scatter=summed(moment.scatter_around(mean)),
        mean=mean,
        quartic_sum=summed(moment.quartic_sum),
        absolute_sum=summed(moment.absolute_sum),
        num_tokens=count,
    )
