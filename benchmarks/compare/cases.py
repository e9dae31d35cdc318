"""The cases of the comparison: what is run, and under which settings."""

from dataclasses import asdict, dataclass, fields

from benchmarks.harness.records import Table

TASKS = {
    "text": ("sst2", "trec", "cola", "mrpc", "clinc150", "subj", "mr", "ag_news"),
    "vision": ("tiny_imagenet32", "fashion_mnist", "flowers5", "digits8x8"),
    "language": ("ptb", "wikitext2"),
    "commonsense": ("commonsense",),
}
# Training rows at most; of a language model, blocks of 256 tokens.
ROWS = {"text": 1000, "vision": 4000, "language": 256, "commonsense": 4000}
RATIOS = (0.8, 0.6, 0.4)
STORAGES = ("pivoted", "factored")
SEEDS = (0, 1, 2)
# Passes over the training rows.
EPOCHS = 3
# With ten rows or less for each of its classes, a task is far from converged after three.
EPOCHS_BY_TASK = {"clinc150": 10, "commonsense": 1}

# Ways to train that keep every parameter. A method is one of them, or stages with "+" between them:
#   jactus            one pass: calibrate with a warmed-up head, compress, train the adaptation ranks
#   jactus-cores      as the paper: compress, train the cores
#   svd-llm+lora      compress the pretrained model with a peer, then train LoRA on the factors; so does jactus+lora
#   jactus+full       compress, then train all that is left: what is deployed, embeddings and norms, too; so does
#                     svd-llm+full
#   lora+jactus-cores train LoRA for the first part of the steps, merge it, then as jactus-cores; so does
#                     lora+svd-llm+lora
#   full+jactus-cores the same with all weights in the first part; so does full+svd-llm+lora
#   hira+jactus-cores the same with HiRA in the first part; after a first stage, cores are better than adaptation ranks
# (lora-embeddings trains embeddings, tied to the output layer, and norms whole, too, as full does; jactus-embeddings
# is jactus with these; jactus-8-bits and jactus-4-bits hold in so few bits what does not train; jactus-retained has
# its adaptation in the retained space.)
FULL_SIZE = ("full", "lora", "lora-embeddings", "dora", "pissa", "rslora", "eva", "corda", "lora-ga", "hira")
# Part of the steps that a method which starts with a full-size stage gives to it. One schedule goes over both stages,
# but for a warm-up of what is new in the last one.
FIRST_STAGE_SHARE = 0.8


@dataclass(frozen=True)
class LearningRateGroup:
    """Tasks that share learning rates.

    Attributes:
        tasks: Whose held-out training rows choose them.
        num_rows: Of each, at most, held-out ones among them.
    """

    tasks: tuple[str, ...]
    num_rows: int


# Learning rates are chosen from a grid by `compare learning-rates`, on held-out training rows, which gives
# results/compare/KIND-learning_rates.json. A grid goes on where a method's best rate is at its end. A task that is not
# a group of its own is in the one called "others".
LEARNING_RATE_GROUPS = {
    "text": {
        "others": LearningRateGroup(("trec", "mr"), 1500),
        # With 150 classes and more epochs it wants other rates: LoRA and DoRA twice as large ones.
        "clinc150": LearningRateGroup(("clinc150",), 1000),
    },
    "vision": {"others": LearningRateGroup(("tiny_imagenet32", "fashion_mnist", "flowers5"), 4000)},
    "language": {"others": LearningRateGroup(("ptb",), 256)},
    "commonsense": {"others": LearningRateGroup(("commonsense",), 800)},
}
LEARNING_RATE_GRID = {
    "text": {
        "full": (5e-5, 1e-4, 2e-4, 4e-4),
        "hira": (2e-3, 4e-3, 8e-3, 1.6e-2),  # around its rate in PEFT's own comparison
        "default": (2.5e-4, 5e-4, 1e-3, 2e-3),
    },
    "vision": {
        "full": (4e-4, 8e-4, 1.6e-3, 3.2e-3),
        "hira": (4e-3, 8e-3, 1.6e-2, 3.2e-2),
        "default": (1e-3, 2e-3, 4e-3, 8e-3),
    },
    "language": {
        "full": (4e-4, 8e-4, 1.6e-3, 3.2e-3),
        "hira": (8e-3, 1.6e-2, 3.2e-2, 6.4e-2),
        "default": (1e-3, 2e-3, 4e-3, 8e-3),
    },
    "commonsense": {"hira": (2e-3, 4e-3, 8e-3), "default": (5e-4, 1e-3, 2e-3)},
}
# Rows without compression.
UNCOMPRESSED = {
    "text": ("full", "lora", "dora", "pissa", "rslora", "eva", "corda", "lora-ga", "hira"),
    "vision": ("full", "lora", "dora", "pissa", "hira"),
    "language": ("full", "lora", "lora-embeddings", "dora", "pissa", "hira"),
    "commonsense": ("lora", "dora", "pissa", "hira"),
}
# Rows at every ratio.
COMPRESSED = dict.fromkeys(TASKS, ("jactus", "jactus-retained", "svd+lora", "svd-llm+lora"))
COMPRESSED["text"] += ("hira+jactus-cores",)
COMPRESSED["vision"] += ("hira+jactus-cores",)
COMPRESSED["language"] += ("jactus-embeddings",)
COMPRESSED["commonsense"] = ("jactus", "jactus-retained", "svd-llm+lora")
# At the smallest ratio only: the paper's way, and what a first stage at full size does for it and for the best peer;
# on language, what other last stages do, too. Learning rates are chosen for them as for all others.
FURTHER = {
    "text": ("jactus-cores", "lora+jactus-cores", "full+jactus-cores", "lora+svd-llm+lora", "full+svd-llm+lora"),
    "vision": ("jactus-cores", "lora+jactus-cores", "jactus+lora"),
    "language": (
        "jactus-cores",
        "jactus+lora",
        "jactus+full",
        "lora+jactus-cores",
        "full+jactus-cores",
        "full+svd-llm+lora",
        "svd-llm+full",
    ),
    "commonsense": (),
}
# At the largest ratio only, with the learning rate of the method that they are compared with.
IN_FEW_BITS = {"jactus-8-bits": 8, "jactus-4-bits": 4}
SAME_LEARNING_RATE = dict.fromkeys(IN_FEW_BITS, "jactus")
# What a task is scored by, where accuracy says little: that of CoLA's larger class is 69 %.
METRIC = {"cola": "matthews_correlation"}


@dataclass(frozen=True)
class Case:
    """One training run.

    Attributes:
        task: Folder of the data.
        method: One of `FULL_SIZE`, or stages (above).
        retained_ratio: Of the targeted parameters; 1 for methods that keep all.
        storage: Whose parameter count the budget is counted in.
        seed: Of the new head, the order of the batches, and the method.
        learning_rate: Peak of the schedule; a last stage has the end of it.
        num_rows: Training rows at most.
        epochs: Over them, in all stages together.
        scored_on: ``"test"``, or ``"held-out"`` training rows.
        first_learning_rate: Peak of a full-size first stage.
    """

    task: str
    method: str
    retained_ratio: float = 1.0
    storage: str = "factored"
    seed: int = 0
    learning_rate: float = 1e-3
    num_rows: int = 1500
    epochs: float = 3
    scored_on: str = "test"
    first_learning_rate: float | None = None

    @property
    def last_stages(self) -> str:
        """The method without its full-size first stage, if it has one."""
        return self.method if first_stage(self.method) is None else self.method.partition("+")[2]

    @property
    def first_epochs(self) -> float:
        """Epochs of that first stage."""
        return 0.0 if first_stage(self.method) is None else self.epochs * FIRST_STAGE_SHARE

    @property
    def label(self) -> str:
        """What a table calls the method."""
        if self.retained_ratio == 1.0:
            return self.method
        storage = f" {self.storage}" if is_ours(self.method) else ""
        return f"{self.method}{storage} {self.retained_ratio:g}"

    def settings(self) -> dict:
        return asdict(self) | {"label": self.label}


def results_of(folder, kind):
    """Return the table of a kind's results, also those of the learning-rate grids."""
    return Table(folder / f"{kind}.jsonl", key=tuple(field.name for field in fields(Case)))


def first_stage(method: str) -> str | None:
    """Return the full-size stage of a method that comes before its compression, if there is one."""
    first, _, rest = method.partition("+")
    return first if rest and first in FULL_SIZE else None


def learning_rate_group(kind, task):
    """Return the name of the group whose learning rates a task has."""
    return task if task in LEARNING_RATE_GROUPS[kind] else "others"


def grid(kind, method, best=None):
    """Return the learning rates to try, with one more on each side of the ``best`` of them."""
    last = method.rpartition("+")[2]
    rates = LEARNING_RATE_GRID[kind].get(last, LEARNING_RATE_GRID[kind]["default"])
    while best is not None and best <= rates[0]:
        rates = (rates[0] / 2, *rates)
    while best is not None and best >= rates[-1]:
        rates = (*rates, 2 * rates[-1])
    return rates


def budgets(kind, ratios=RATIOS):
    """Return (method, ratio, storage) of every row of a table; a peer is stored as published."""
    methods = [(method, 1.0) for method in UNCOMPRESSED[kind]]
    methods += [(method, ratio) for ratio in ratios for method in COMPRESSED[kind]]
    methods += [(method, max(ratios)) for method in IN_FEW_BITS]
    methods += [(method, min(ratios)) for method in FURTHER[kind]]
    return [(method, ratio, "pivoted" if is_ours(method) else "factored") for method, ratio in methods]


def is_ours(method):
    """Whether the method compresses with JACTUS, whatever comes before or after it."""
    return any(stage.partition("-")[0] == "jactus" for stage in method.split("+"))
