"""The tuner: what PEFT sees of JACTUS.

As in PEFT's own tuners there are a config, a layer and a model. Beside them: which modules are meant (`targeting`),
what each rank is worth and which ranks a budget buys (`planning`, `model_size`, `rank_table`), the tensors of a saved
adapter (`adapter_format`), and factors that one process makes for all (`replication`).
"""

from peft_jactus.tuner.config import JactusConfig
from peft_jactus.tuner.layer import JactusLayer
from peft_jactus.tuner.model import JactusModel
from peft_jactus.tuner.planning import RankPlan, plan_ranks
from peft_jactus.tuner.rank_table import LayerRank, RankSummary

__all__ = ["JactusConfig", "JactusLayer", "JactusModel", "LayerRank", "RankPlan", "RankSummary", "plan_ranks"]
