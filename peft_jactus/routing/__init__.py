"""What a routed model does while it serves (PARSE: Zhu et al., arXiv:2605.08568).

A subpackage because each part is a matter of its own: which experts to take (`selection`), how a layer runs them
(`layer`, `patterns`, `kernels`), which choices are remembered (`cache`), and who decides when (`router`).
`peft_jactus.parse` makes routed models and trains their routers.
"""

from peft_jactus.routing.config import RouterConfig
from peft_jactus.routing.installation import ROUTER_NAME, check_routable, install_router, remove_router, router_of
from peft_jactus.routing.router import RankRouter

__all__ = [
    "ROUTER_NAME",
    "RankRouter",
    "RouterConfig",
    "check_routable",
    "install_router",
    "remove_router",
    "router_of",
]
