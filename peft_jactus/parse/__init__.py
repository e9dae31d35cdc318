"""PARSE: a router picks, for each prompt, which ranks of a compressed model run (Zhu et al., arXiv:2605.08568).

Make a compressed model a routed one (`add_router`) and train its router against the dense model (`RouterTrainer`);
`peft_jactus.routing` is what the model does from then on.
"""

from peft_jactus.parse.building import add_router
from peft_jactus.parse.importance import expert_importance
from peft_jactus.parse.training import RouterTrainer, initialize_router_
from peft_jactus.routing import RankRouter, RouterConfig

__all__ = ["RankRouter", "RouterConfig", "RouterTrainer", "add_router", "expert_importance", "initialize_router_"]
