"""The user's settings: fields and checks, nothing computed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from peft.config import PeftConfig

from peft_jactus._version import __version__
from peft_jactus.numerics.adaptation import AdaptationInit, AdaptationSpace
from peft_jactus.numerics.approximation import Decomposition, DecompositionOptions
from peft_jactus.numerics.factorization import FactorizationOptions
from peft_jactus.numerics.moments import LayerStatistics, StatisticsNeeds
from peft_jactus.tuner.adapter_format import AdapterShape, adapter_format
from peft_jactus.tuner.config_checks import FROM_CHECKPOINT, check_config, targets_all_linear
from peft_jactus.tuner.config_reference import with_reference
from peft_jactus.tuner.peft_type import jactus_peft_type


@with_reference
@dataclass
class JactusConfig(PeftConfig):
    """Fine-tune a model and get a smaller one.

    Each targeted linear layer is replaced by a frozen low-rank approximation and a few ranks that train. The
    approximation is computed from the weight and from calibration statistics (Ge et al., arXiv:2605.02829). With
    ``adaptation_rank=0``, a core between two frozen bases trains instead, as in the paper. Call
    `peft_jactus.calibrate` with this config before `peft.get_peft_model`, unless ``decomposition="svd"``.
    """

    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={
            "help": (
                "Names of the linear layers to compress: suffixes, a regular expression, or 'all-linear'. "
                "'all-linear' (recommended, as only targeted layers get smaller) means all except the output layer of "
                "a language model, `modules_to_save`, and the head that PEFT trains whole for `task_type`. Default: "
                "PEFT's choice for the architecture, usually two attention projections."
            )
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names (suffixes or a regular expression) of modules that are not compressed. Default: none."
        },
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules that are trained and saved whole, with the adapter; for a newly initialised head."},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None,
        metadata={"help": "Indices of the blocks to compress. Default: all."},
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Name of the module list that `layers_to_transform` indexes, e.g. 'layers'."},
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={
            "help": (
                "Ranks that you set, by full module name or regular expression. They count towards the budget; the "
                "other layers share the rest. A rank whose factors would not be smaller than the weight means full "
                "rank: the layer stays dense."
            )
        },
    )
    retained_ratio: float = field(
        default=0.8,
        metadata={
            "help": (
                "Fraction of the targeted layers' parameters that is kept, in (0, 1]. A higher value keeps more "
                "accuracy and takes more memory; 0.8 is the paper's main setting."
            )
        },
    )
    model_ratio: float | None = field(
        default=None,
        metadata={
            "help": (
                "In place of `retained_ratio`: fraction of the whole model's parameters that is kept, in (0, 1]. A "
                "higher value keeps more accuracy and takes more memory. Embeddings, norms and heads are kept whole "
                "and are counted. Default: `retained_ratio` is the budget."
            )
        },
    )
    max_model_size: int | str | None = field(
        default=None,
        metadata={
            "help": (
                "In place of `retained_ratio`: largest size of the compressed checkpoint's weights, in bytes or as "
                "'60MB' or '1.5GB'. It is counted in the dtype that the model has when it is compressed. A larger "
                "size keeps more accuracy. Default: `retained_ratio` is the budget."
            )
        },
    )
    allocation: Literal["global", "uniform"] = field(
        default="global",
        metadata={
            "help": (
                "'global' gives ranks to the layers where a parameter lowers the loss most; 'uniform' keeps "
                "`retained_ratio` of every layer."
            )
        },
    )
    storage: Literal["factored", "pivoted"] = field(
        default="pivoted",
        metadata={
            "help": (
                "Form in which the layers are shipped; the budget is counted in it. 'factored': two factors, rank * "
                "(out + in) numbers. 'pivoted': rows of the weight and coefficients, rank * (out + in - rank) "
                "numbers. 'pivoted' allows higher ranks at the same budget, but training needs more memory and time."
            )
        },
    )
    decomposition: Decomposition = field(
        default="jactus",
        metadata={
            "help": (
                "How weights are approximated. 'jactus' weighs inputs and output gradients by calibration statistics, "
                "in a union of subspaces (`weight_energy`). 'kfac' does the same, always in the whole space. "
                "'svd-llm' and 'asvd' weigh only the inputs, 'fwsvd' the rows of the weight. 'svd' truncates the "
                "weight's singular value decomposition: it needs no data and is much less accurate."
            )
        },
    )
    weight_energy: float = field(
        default=1.0,
        metadata={
            "help": (
                "Share of the weight's squared singular values that its directions in the union hold (the paper's "
                "alpha), in (0, 1]. With 1 the union restricts nothing: input and gradient directions add nothing. "
                "The paper uses less; this was not more accurate where it was measured, and takes longer."
            )
        },
    )
    input_energy: float = field(
        default=0.99,
        metadata={
            "help": (
                "Share of the input covariance's trace that the input directions in the union hold (beta), in [0, 1]. "
                "More widens the union; 0 leaves them out. Without effect while `weight_energy` is 1."
            )
        },
    )
    gradient_energy: float = field(
        default=0.99,
        metadata={
            "help": (
                "Share of the gradient covariance's trace that the gradient directions in the union hold (gamma), in "
                "[0, 1]. More widens the union; 0 leaves them out. Without effect while `weight_energy` is 1."
            )
        },
    )
    shrinkage: float | str = field(
        default="ledoit-wolf",
        metadata={
            "help": (
                "How far covariances are shrunk towards a scaled identity: 'ledoit-wolf' estimates it from the data, "
                "a number in [0, 1] sets it. A larger value trusts the calibration data less."
            )
        },
    )
    damping: float = field(
        default=1e-6,
        metadata={
            "help": (
                "Smallest variance of any direction, as a share of the mean variance, > 0. It keeps matrix roots well "
                "conditioned in directions that the calibration data does not use. A larger value trusts the "
                "calibration data less there."
            )
        },
    )
    rank_floor: float = field(
        default=0.5,
        metadata={
            "help": (
                "Smallest rank of a layer with allocation='global', as a share of its uniform rank, in [0, 1]. 1 is "
                "the uniform allocation; 0 uses only local losses, which was worse in measurements."
            )
        },
    )
    adaptation_rank: int = field(
        default=32,
        metadata={
            "help": (
                "Ranks of each layer that learn the task, >= 0, but at most half of its ranks: a product of two thin "
                "matrices, as in LoRA. More of them learn more, and leave less for the compressed weight. In a layer "
                "that stays dense, they are extra. 0: only the core trains, as in the paper."
            )
        },
    )
    adaptation_init: AdaptationInit | None = field(
        default=None,
        metadata={
            "help": (
                "Input directions in which the adaptation ranks start: the leading ones of the weight's mean gradient "
                "over the calibration batches ('gradient'), or of the inputs ('inputs'). 'random' is LoRA's start, "
                "without data. Default: 'random' for decomposition='svd', which needs no data; 'gradient' for all "
                "others."
            )
        },
    )
    adaptation_space: AdaptationSpace = field(
        default="free",
        metadata={
            "help": (
                "What the adaptation ranks may add. 'free': anything, and the compressed weight leaves them ranks. "
                "'retained': only what fits the rows or columns that the compressed weight has, which takes no rank."
            )
        },
    )
    train_core: bool = field(
        default=False,
        metadata={
            "help": (
                "Also train the core between the two bases. Without adaptation ranks, it always trains. A core takes "
                "more memory than adaptation ranks: rank^2 numbers per layer, in float32."
            )
        },
    )
    frozen_bits: int | None = field(
        default=None,
        metadata={
            "help": (
                "8 or 4: store the frozen part of each layer in 8 or 4 bits per number, in groups of 64 with one "
                "scale each, and compute in the model's dtype, as QLoRA does. It takes half or a quarter of the "
                "memory of 16 bits; a step takes longer. 4 bits need bitsandbytes, and are rounded by the calibration "
                "statistics if the decomposition uses them. Not for cores that train. Default: the model's dtype."
            )
        },
    )
    rank_multiple: int = field(
        default=8,
        metadata={
            "help": (
                "Ranks are multiples of this number, >= 1, in layers whose smaller side is at least 32 times as "
                "large: matrix products of other sizes are slower. A larger value gives a coarser choice. Ranks of "
                "`rank_pattern` are used as they are."
            )
        },
    )
    bias_correction: bool = field(
        default=True,
        metadata={
            "help": (
                "If a layer has a bias, correct it by the mean error of the approximation, and approximate around the "
                "mean of the inputs. This costs nothing."
            )
        },
    )
    keep_base_weights: bool = field(
        default=False,
        metadata={
            "help": (
                "Keep the dense weights, too. This costs their memory. It is needed for `disable_adapter` (DPO "
                "without a reference model), `unload`, and to compute several adapters on one model."
            )
        },
    )
    init_weights: bool | str = field(
        default=True,
        metadata={
            "help": (
                "True: start from the approximation of the weight. False: a random core on a data-free basis, for "
                "tests. Saved configs have 'empty': values come from the checkpoint."
            )
        },
    )
    layer_ranks: dict[str, int] = field(
        default_factory=dict,
        metadata={
            "help": (
                "Written by `get_peft_model`: the rank of each targeted module. Full rank, min(out, in), means that "
                "factors would not be smaller, so the layer is shipped dense. To set ranks, use `rank_pattern`."
            )
        },
    )
    layer_energy: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "Written by `get_peft_model`: share of each layer's weighted energy that is kept."},
    )
    id2label: dict[int, str] | None = field(
        default=None,
        metadata={"help": "Written when an adapter with a head is saved: the names of the model's classes."},
    )
    peft_jactus_version: str | None = field(
        default=None, metadata={"help": "Written when an adapter is saved: the version of peft-jactus to install."}
    )
    adapter_format: int | None = field(
        default=None, metadata={"help": "Written when an adapter is saved: the format of its tensors."}
    )
    statistics: Mapping[str, LayerStatistics] | None = field(
        default=None,
        repr=False,
        compare=False,
        metadata={
            "help": (
                "What `calibrate` returned; `calibrate` sets this field. Copies of the config share it; it is never "
                "saved. `get_peft_model` removes it from the config that it is given, to free memory for training. To "
                "keep it, give `get_peft_model` a copy (`dataclasses.replace`)."
            )
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]  # peft has no annotations
        self.peft_type = jactus_peft_type()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        if self.from_checkpoint and self.adapter_format == 1:
            self.adaptation_rank = 0  # whatever the default is now
        check_config(self)

    @property
    def asked_ratio(self) -> float | None:
        """`retained_ratio`, unless the budget is given in another way."""
        return self.retained_ratio if self.model_ratio is None and self.max_model_size is None else None

    @property
    def asked_budget(self) -> str:
        """The field that gives the budget and its value, for messages."""
        others = (name for name in ("model_ratio", "max_model_size") if getattr(self, name) is not None)
        name = next(others, "retained_ratio")
        return f"`{name}`={getattr(self, name)!r}"

    @property
    def from_checkpoint(self) -> bool:
        """Whether values come from a checkpoint, so that nothing is decomposed."""
        return self.init_weights == FROM_CHECKPOINT

    @property
    def core_trains(self) -> bool:
        """Whether the core of each layer trains."""
        return self.train_core or self.adaptation_rank == 0

    def adapter_shape(self, rank: int, out_features: int, in_features: int) -> AdapterShape:
        """Return how a layer of this shape and total ``rank`` is shared out."""
        return AdapterShape.of(self, rank, out_features, in_features)

    @property
    def needs_statistics(self) -> bool:
        """Whether `get_peft_model` reads calibration statistics."""
        options = self.factorization_options()
        along_data = options.adaptation_rank > 0 and options.adaptation_init != "random"
        return options.decomposition.needs_statistics or along_data

    def statistics_needs(self) -> StatisticsNeeds:
        """Return what a calibration has to collect beside the two covariances."""
        options = self._options(data_free=self.init_weights is False)  # a saved one may compute new values later
        return StatisticsNeeds(
            row_fisher=options.decomposition.needs_row_fisher,
            num_directions=options.adaptation_rank if options.adaptation_init == "gradient" else 0,
        )

    def factorization_options(self) -> FactorizationOptions:
        """Return the settings of the numerical part."""
        # A random start (PEFT's tests) is data-free whatever the decomposition.
        return self._options(data_free=self.init_weights is not True)

    def _options(self, *, data_free: bool) -> FactorizationOptions:
        decomposition = "svd" if data_free else self.decomposition
        init: AdaptationInit = "random" if decomposition == "svd" else "gradient"
        return FactorizationOptions(
            decomposition=DecompositionOptions(
                decomposition=decomposition,
                weight_energy=self.weight_energy,
                input_energy=self.input_energy,
                gradient_energy=self.gradient_energy,
                shrinkage=self.shrinkage,  # type: ignore[arg-type]  # checked in __post_init__
                damping=self.damping,
            ),
            retained_ratio=self.retained_ratio,
            allocation=self.allocation,
            storage=self.storage,
            rank_floor=self.rank_floor,
            rank_multiple=self.rank_multiple,
            bias_correction=self.bias_correction,
            adaptation_rank=self.adaptation_rank,
            adaptation_init=init if data_free else (self.adaptation_init or init),
            adaptation_space=self.adaptation_space,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as they are saved: with decided ranks, they ask for a checkpoint's values and layers."""
        values = {f.name: copy.deepcopy(getattr(self, f.name)) for f in fields(self) if f.name != "statistics"}
        if self.layer_ranks:
            values["init_weights"] = FROM_CHECKPOINT
            if targets_all_linear(self.target_modules):  # which other models have under other names
                values["target_modules"] = set(self.layer_ranks)
            values["peft_jactus_version"] = __version__
            values["adapter_format"] = adapter_format(self)
        return values
