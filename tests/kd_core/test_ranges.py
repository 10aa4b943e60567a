"""Settings out of their range or choice are refused by their path."""

from dataclasses import dataclass
from typing import Literal

import pytest

from kd_core.errors import UsageError
from kd_core.ranges import ABOVE_0, AT_LEAST_1, check_settings


@dataclass(frozen=True)
class Part:
    shard: Literal["none", "gradients"] = "none"
    steps: int = 1
    betas: tuple[float, ...] | None = (0.5, 0.9)

    def __post_init__(self) -> None:
        check_settings(self, "part.", steps=AT_LEAST_1, betas=ABOVE_0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shard": "all"}, r"^part\.shard: got 'all'; wanted one of none, gradients\.$"),
        ({"shard": None}, r"^part\.shard: got None; wanted one of none, gradients\.$"),
        ({"steps": 0}, r"^part\.steps: got 0; wanted at least 1\.$"),
        ({"betas": (0.5, float("nan"))}, r"^part\.betas: got \(0\.5, nan\); wanted more than 0"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_its_path(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Part(**settings)  # type: ignore[arg-type]


def test_settings_that_can_be_are_taken() -> None:
    Part()
    Part(shard="gradients", steps=3, betas=None)
