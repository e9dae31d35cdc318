"""The errors and warnings of this package that have a name of their own."""


class NumericalWarning(UserWarning):
    """A result is valid, but less accurate or smaller than requested; the message says by how much."""


class RoutingWarning(UserWarning):
    """A routed model ran all ranks of its layers, because its router chose none."""


class DamagedCheckpointError(ValueError):
    """A file of a checkpoint is not the one that was saved."""


class BaseWeightsFreedError(ValueError):
    """An operation needs the dense weights, which were freed when the model was compressed.

    Args:
        action: What was attempted, as in "cannot <action>".
    """

    def __init__(self, action: str) -> None:
        super().__init__(
            f"Cannot {action}: the dense weights were freed. Create the adapter with `keep_base_weights=True` to keep "
            "them."
        )
