"""A strength that changes over the sampling, in the terms of ComfyUI's hook keyframes.

Shapes: B rows (one prompt at one timestep each).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..errors import ReferenceMismatchError

TIMESTEPS = 1000  # that Stable Diffusion and ELLA count
LAST_TIMESTEP = TIMESTEPS - 1
# percents of whole timesteps are not exact in float32
SLACK_TIMESTEPS = 0.5


def acts_between(timestep_B: torch.Tensor, start_percent: float, end_percent: float) -> torch.Tensor:
    """(B,) whether each timestep lies in a part of the sampling, 0 (pure noise) to 1 (picture)."""
    # the ends are open: flow models begin at timestep 1000
    percent_B = (1.0 - timestep_B.float() / LAST_TIMESTEP).clamp(0.0, 1.0)
    slack = SLACK_TIMESTEPS / LAST_TIMESTEP
    return (percent_B >= start_percent - slack) & (percent_B <= end_percent + slack)


@dataclass(frozen=True)
class StrengthKeyframe:
    """A factor that counts from a part of the sampling on.

    Args:
        percent: 0 (pure noise) to 1 (picture), in timesteps.
        strength: the factor.
        steps: it counts for at least so many steps of the schedule, even where the next keyframe has begun.
    """

    percent: float
    strength: float
    steps: int = 0

    @property
    def timestep(self) -> float:
        """The timestep it begins at; 0% is before every timestep, and 100% after."""
        if self.percent <= 0.0:
            return math.inf
        return -math.inf if self.percent >= 1.0 else (1.0 - self.percent) * LAST_TIMESTEP

    def has_begun(self, timestep: float) -> bool:
        return timestep <= self.timestep + SLACK_TIMESTEPS


@dataclass(frozen=True)
class StrengthKeyframes:
    """Keyframes in the order of their percents; the first counts from the beginning, and none at all are a factor of 1.

    Args:
        keyframes: sorted here.
        schedule: the sampler's timesteps, in its order, which the keyframes' ``steps`` are counted on; without it they
            are not.
    Raises:
        ReferenceMismatchError: percents or strengths that are not finite.
    """

    keyframes: Sequence[StrengthKeyframe] = ()
    schedule: Sequence[float] = ()

    def __post_init__(self):
        for keyframe in self.keyframes:
            if not (math.isfinite(keyframe.percent) and math.isfinite(keyframe.strength)):
                raise ReferenceMismatchError(f"a keyframe at {keyframe.percent} has the strength {keyframe.strength}, which is "
                                             "not finite. Use numbers such as 0.5.")
        object.__setattr__(self, "keyframes", tuple(sorted(self.keyframes, key=lambda keyframe: keyframe.percent)))
        object.__setattr__(self, "schedule", tuple(self.schedule))

    @property
    def counts_steps(self) -> bool:
        """Whether the answer depends on the schedule."""
        return any(keyframe.steps for keyframe in self.keyframes)

    def on(self, schedule: Sequence[float]) -> "StrengthKeyframes":
        """These keyframes, their steps counted on another schedule."""
        return replace(self, schedule=schedule)

    def of_rows(self, timestep_B: torch.Tensor) -> torch.Tensor:
        """(B,) the factor at each timestep."""
        if not self.keyframes:
            return torch.ones_like(timestep_B, dtype=torch.float32)
        timesteps = timestep_B.tolist()
        factors = {timestep: self.at(timestep) for timestep in dict.fromkeys(timesteps)}
        return torch.tensor([factors[timestep] for timestep in timesteps], dtype=torch.float32, device=timestep_B.device)

    def at(self, timestep: float) -> float:
        """The factor at one timestep, after the steps of the schedule that lie before it."""
        if not self.keyframes:
            return 1.0
        current, used = 0, 0
        for step in (*(before for before in self.schedule if before > timestep), timestep):
            if used >= self._kept_steps(current):
                following = self._following(current, step)
                current, used = following, used if following == current else 0
            used += 1
        return self.keyframes[current].strength

    def _following(self, current: int, timestep: float) -> int:
        """The last keyframe that has begun, or the first of them that will be kept for some steps."""
        for index in range(current + 1, len(self.keyframes)):
            if not self.keyframes[index].has_begun(timestep):
                break
            current = index
            if self._kept_steps(index):
                break
        return current

    def _kept_steps(self, index: int) -> int:
        """A keyframe that begins before the schedule does is not kept."""
        keyframe = self.keyframes[index]
        return keyframe.steps if self.schedule and keyframe.timestep <= max(self.schedule) else 0
