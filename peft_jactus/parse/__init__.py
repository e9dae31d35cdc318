"""PARSE: a router picks, for each prompt, which ranks of a compressed model run (Zhu et al., arXiv:2605.08568).

Make a compressed model a routed one (`routed_copy`) and train its router against the dense model (`RouterTrainer`).
Inside: which experts to take (`experts`), how a layer runs them (`layer`, `patterns`, `kernels`, `fused`), which
choices are remembered (`cache`), who decides when (`router`), and how a model gets one (`conversion`,
`installation`). What is best for all prompts alike becomes a plain compressed model again (`static`). Nobody outside
of this room imports it; the loader finds it through `deployment.extensions`.
"""

from peft_jactus.parse.config import RouterConfig
from peft_jactus.parse.conversion import routed_copy
from peft_jactus.parse.importance import expert_importance
from peft_jactus.parse.router import RankRouter
from peft_jactus.parse.static import static_copy
from peft_jactus.parse.training import RouterTrainer, initialize_router_

__all__ = [
    "RankRouter",
    "RouterConfig",
    "RouterTrainer",
    "expert_importance",
    "initialize_router_",
    "routed_copy",
    "static_copy",
]
