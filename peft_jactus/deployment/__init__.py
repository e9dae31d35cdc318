"""What is shipped: compressed checkpoints, how they are written, loaded and looked at.

To transformers a compressed checkpoint is one of a quantisation method named ``jactus``. `config` is its
``quantization_config``, `quantizer` rebuilds and saves the model, `layers` are its layers, `names` and `integrity` are
about its files, and `extensions` lets another room add to it. `export` writes it from an adapter (`arguments`,
`copying`, `atomic_folder`, `model_card`), `remote_code` in a form that needs no package. `ranks` and `plots` look at
it.
"""

from peft_jactus.deployment.export import compressed_copy, export_compressed
from peft_jactus.deployment.layers import LowRankLinear, PivotedLinear
from peft_jactus.deployment.plots import plot_plan, plot_ranks
from peft_jactus.deployment.quantizer import loading_options
from peft_jactus.deployment.ranks import rank_summary
from peft_jactus.deployment.remote_code import export_remote_code

__all__ = [
    "LowRankLinear",
    "PivotedLinear",
    "compressed_copy",
    "export_compressed",
    "export_remote_code",
    "loading_options",
    "plot_plan",
    "plot_ranks",
    "rank_summary",
]
