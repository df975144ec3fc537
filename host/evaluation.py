"""One evaluation of the model, as the host announces it to our wrapper.

Shapes: B rows of the latent batch, T sigmas of a schedule.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Evaluation:
    """When, and for which rows.

    Args:
        sampling: the host's ``model_sampling``, which tells the time.
        sigma_B: of each row of the latent batch, on its device.
        announced_T: sigmas that the sampler announced, in its order, without the final 0; may be empty.
        frames: which frames the rows are, in a context window; None: rows are frames.
    """

    sampling: Any
    sigma_B: torch.Tensor
    announced_T: torch.Tensor
    frames: Sequence[int] | None

    @classmethod
    def of_call(cls, model, x_in: torch.Tensor, sigma: torch.Tensor, transformer_options) -> "Evaluation":
        """From what a CALC_COND_BATCH wrapper is given."""
        announced = transformer_options.get("sample_sigmas")
        announced_T = sigma.new_empty(0) if announced is None else announced[announced > 0]
        rows = x_in.shape[0]
        return cls(model.model_sampling, sigma.to(x_in.device).expand(rows), announced_T,
                   _frame_indices(transformer_options, rows))

    @property
    def rows(self) -> int:
        """B."""
        return self.sigma_B.shape[0]

    def times(self, of_sigma: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, list[float]]:
        """The time of each row, and the distinct times of the schedule."""
        return of_sigma(self.sigma_B), list(dict.fromkeys(of_sigma(self.announced_T).tolist()))

    def meets(self, entry: dict) -> bool:
        """Whether the host will use this entry now (it drops entries outside their timestep range)."""
        sigma = self.sigma_B[0]
        return bool(entry.get("timestep_end", sigma) <= sigma <= entry.get("timestep_start", sigma))


def _frame_indices(transformer_options, rows: int) -> Sequence[int] | None:
    """Frames in the current context window: the host's own, or AnimateDiff-Evolved's; None outside of windows."""
    window = transformer_options.get("context_window")
    for indices in (_window_frames(window), transformer_options.get("ad_params", {}).get("sub_idxs")):
        # outside of a window AnimateDiff leaves the last window's indices behind: only a matching length counts
        if indices is not None and len(indices) == rows:
            return list(indices)
    return None


def _window_frames(window) -> Sequence[int] | None:
    """Frames of the host's context window; newer hosts put an earlier frame before them, whose result they drop."""
    indices = getattr(window, "index_list", None)
    before = getattr(window, "causal_anchor_index", None)
    return indices if indices is None or before is None or before < 0 else [before, *indices]
