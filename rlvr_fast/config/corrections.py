"""How a sampler that is not quite the trainer is made up for."""

from enum import StrEnum


class MismatchCorrection(StrEnum):
    """What the ratio of the trainer's and the sampler's probability does to a token's loss."""

    NONE = "none"
    TOKEN_TRUNCATE = "token_truncate"
    TOKEN_MASK = "token_mask"
    SEQUENCE_TRUNCATE = "sequence_truncate"
    SEQUENCE_MASK = "sequence_mask"

    @property
    def by_sequence(self) -> bool:
        """One ratio for all tokens of a sequence."""
        return self.startswith("sequence_")

    @property
    def masks(self) -> bool:
        """Ratios outside of the bounds become 0; else the bound that they passed."""
        return self.endswith("_mask")


class MismatchReduction(StrEnum):
    """How the log-ratios of a sequence become one."""

    SUM = "sum"
    MEAN = "mean"


def check_bounds(floor: float, cap: float) -> None:
    """Raises a ValueError unless `0 <= floor < cap` and both are finite."""
    if not 0 < cap < float("inf"):
        raise ValueError(f"mismatch_cap: wanted > 0 and finite, got {cap}")
    if not 0 <= floor < cap:
        raise ValueError(f"mismatch_floor: wanted >= 0 and < mismatch_cap, {cap}, got {floor}")
