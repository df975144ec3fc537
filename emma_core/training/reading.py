"""How an ELLA may begin: what the base's cross-attention reads of its tokens is to be what it reads of the own text encoder's.

While it denoises pictures under their captions, the UNet asks its cross-attention queries; some are kept. For these, attention
over the ELLA's tokens is compared with attention over the own tokens of the same caption. That takes no pass of the UNet, so an
ELLA reads many times as many captions in the same time; what only the whole UNet tells, it learns afterwards.

Shapes: N rows that asked, Q queries of each, of width E; B rows of a batch, K tokens of width W, latents 4 x h x w.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ..base.backbones import Backbone
from ..base.schedule import TIMESTEPS, add_noise
from ..errors import TrainingDataError
from .config import TrainConfig
from .draws import Batch, TrainingSet
from .own_text import Texts, of_one_length
from .student import tokens_of_texts

if TYPE_CHECKING:
    from ..model.connector import Connector

ROWS, QUERIES = 512, 24  # for Stable Diffusion 1.5 these are 0.3 GB
_TEXTS_COMPARED, _ROWS_COMPARED, _AT_ONCE = 8, 64, 8
_LEAST_VARIANCE = 1e-12  # of an attention that gives nothing, whatever the text
_CROSS_ATTENTION = ".attn2"


@dataclass(frozen=True, eq=False)
class Reading:
    """What the cross-attention was asked, and what it reads of captions.

    Args:
        batches: as many of the first ones learn from it.
        attentions: name -> cross-attention of the UNet, as diffusers has them.
        asked: name -> (N, Q, E) on the CPU.
        timestep_N: when the rows asked, ascending.
        variance: name -> by how much captions differ in what is read.
        texts: captions as the base's own text encoder reads them.
    """

    batches: int
    attentions: Mapping[str, Any]
    asked: Mapping[str, torch.Tensor]
    timestep_N: torch.Tensor
    variance: Mapping[str, float]
    texts: Texts

    def teaches(self, batch: Batch) -> bool:
        """Whether it is one of the first batches."""
        return batch.number <= self.batches

    def errors(self, connector: Connector, data: TrainingSet, batch: Batch, device: torch.device) -> torch.Tensor:
        """(B,) squared errors, in shares of what captions differ by: 1 says no more than the mean caption does.

        Each row takes the queries that were asked nearest to its timestep, whatever was denoised then.
        """
        row_B = self._nearest(batch.timestep_B)
        texts = [data.text(row.caption).to(device, torch.float32) for row in batch.rows]
        tokens_BKW = tokens_of_texts(connector, texts, self.timestep_N[row_B].to(device))
        error_B = torch.zeros(len(row_B), device=device)
        for rows_G, own_GKW in of_one_length([self.texts.text(row.caption) for row in batch.rows]):
            for name, attention in self.attentions.items():
                query_GQE = self.asked[name][row_B[rows_G]].to(device)
                with torch.no_grad():
                    wanted_GQE = read(attention, query_GQE, own_GKW)
                found_GQE = read(attention, query_GQE, tokens_BKW[rows_G.to(device)])
                error_G = (found_GQE.float() - wanted_GQE.float()).square().mean((1, 2)) / self.variance[name]
                error_B = error_B.index_add(0, rows_G.to(device), error_G)
        return error_B / len(self.attentions)

    def _nearest(self, timestep_B: torch.Tensor) -> torch.Tensor:
        """(B,) rows."""
        later_B = torch.searchsorted(self.timestep_N, timestep_B).clamp(1, len(self.timestep_N) - 1)
        to_earlier_B = timestep_B - self.timestep_N[later_B - 1]
        return torch.where(to_earlier_B < self.timestep_N[later_B] - timestep_B, later_B - 1, later_B)


def read(attention: Any, query_BQE: torch.Tensor, tokens_BKW: torch.Tensor) -> torch.Tensor:
    """What a cross-attention adds where it asks this, (B, Q, E)."""
    def split(x_BSE: torch.Tensor) -> torch.Tensor:
        return x_BSE.unflatten(-1, (attention.heads, -1)).transpose(1, 2)

    weight = attention.to_k.weight
    tokens_BKW = tokens_BKW.to(weight.device, weight.dtype)
    found_BHQd = F.scaled_dot_product_attention(split(query_BQE.to(weight.device, weight.dtype)),
                                                split(attention.to_k(tokens_BKW)).to(weight.dtype),
                                                split(attention.to_v(tokens_BKW)).to(weight.dtype), scale=attention.scale)
    return attention.to_out[0](found_BHQd.transpose(1, 2).flatten(2))


def cross_attentions(unet: torch.nn.Module) -> dict[str, Any]:
    """Name -> every cross-attention of diffusers' UNet."""
    return {name: module for name, module in unet.named_modules() if name.endswith(_CROSS_ATTENTION)}


@torch.no_grad()
def ask(config: TrainConfig, backbone: Backbone, data: TrainingSet, texts: Texts, device: torch.device) -> Reading:
    """Let the base denoise some pictures of the data under their captions, and keep what its cross-attention is asked.

    The same for the same settings and data, so that a run that goes on asks the same.

    Args:
        config: of the run; how timesteps are drawn.
        backbone: the base, on the device.
        texts: captions as its own text encoder reads them.
    Raises:
        TrainingDataError: no picture has a caption.
    """
    chance, generator = random.Random(config.train.seed), torch.Generator().manual_seed(config.train.seed)
    targets = sorted((chance.randrange(len(data)) for _ in range(ROWS)), key=data.bucket)
    captions = [chance.choice(data.captions(target) or ("",)) for target in targets]
    share_N = (torch.arange(ROWS) + 0.5) / ROWS  # as many as `Draws` draws, evenly
    timestep_N = ((TIMESTEPS - 1) * share_N ** config.objective.timestep_power).round().long()
    timestep_N = timestep_N[torch.randperm(ROWS, generator=generator)]
    attentions = cross_attentions(backbone.unet)
    compared = _compared(data, chance)
    told = [texts.text(caption) for caption in captions]
    asked = _asked(backbone, attentions, data, targets, told, timestep_N, config, device)
    order_N = timestep_N.argsort(stable=True)
    asked = {name: each[order_N] for name, each in asked.items()}
    others = [texts.text(caption) for caption in compared]
    variance = {name: _variance(attentions[name], each[::ROWS // _ROWS_COMPARED], others) for name, each in asked.items()}
    return Reading(config.teacher.reading * config.train.accumulate, attentions, asked, timestep_N[order_N], variance, texts)


def _compared(data: TrainingSet, chance: random.Random) -> list[str]:
    """Some different captions, and none at all, which is learnt as well."""
    different = sorted({caption for index in range(len(data)) for caption in data.captions(index)} - {""})
    if not different:
        raise TrainingDataError("no picture has a caption, and teacher.reading learns what captions differ by. Give the "
                                "pictures captions, or leave teacher.reading out.")
    return ["", *chance.sample(different, min(_TEXTS_COMPARED - 1, len(different)))]


def _asked(
    backbone: Backbone, attentions: Mapping[str, Any], data: TrainingSet, targets, texts, timestep_N, config: TrainConfig,
    device,
) -> dict[str, torch.Tensor]:
    """Some places' queries of each row, in the rows' order; what is random of a row does not depend on the others."""
    kept: dict[str, list[torch.Tensor]] = defaultdict(list)
    rows: list[int] = []

    def chance(row: int) -> torch.Generator:
        return torch.Generator().manual_seed(config.train.seed * ROWS + row)

    def keep(name: str, query_BLE: torch.Tensor) -> None:
        places = [torch.randint(query_BLE.shape[1], (QUERIES,), generator=chance(row)) for row in rows]
        kept[name] += [query_LE[place_Q.to(query_LE.device)].half().cpu()
                       for query_LE, place_Q in zip(query_BLE, places, strict=True)]

    hooks = [attention.to_q.register_forward_hook(lambda module, given, query_BLE, name=name: keep(name, query_BLE))
             for name, attention in attentions.items()]
    order: list[int] = []
    try:
        for some, text_BKW in _batches(targets, texts, data, min(_AT_ONCE, config.train.batch)):
            rows[:] = some
            latent_B4hw = torch.stack([data.latent(targets[row], False) for row in rows]).to(device, torch.float32)
            noise_B4hw = torch.stack([torch.randn(latent_B4hw.shape[1:], generator=chance(row)) for row in rows]).to(device)
            timestep_B = timestep_N[rows].to(device)
            noised_B4hw = add_noise(latent_B4hw, noise_B4hw, backbone.alphas_cumprod_T.to(device)[timestep_B])
            backbone.predict_noise(noised_B4hw, timestep_B, text_BKW.to(device))
            order += rows
    finally:
        for hook in hooks:
            hook.remove()
    place_N = torch.tensor(order).argsort()
    return {name: torch.stack(each)[place_N] for name, each in kept.items()}


def _batches(
    targets: Sequence[int], texts: Sequence[torch.Tensor], data: TrainingSet, at_once: int
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Rows of one size and one length of text, a few at once, with their texts."""
    alike: dict[Any, list[int]] = defaultdict(list)
    for row, (target, text) in enumerate(zip(targets, texts, strict=True)):
        alike[data.bucket(target), text.shape[1]].append(row)
    for rows in alike.values():
        for start in range(0, len(rows), at_once):
            some = rows[start:start + at_once]
            yield some, torch.cat([texts[row] for row in some])


def _variance(attention: Any, query_RQE: torch.Tensor, texts: Sequence[torch.Tensor]) -> float:
    """Over texts, of what is read at the same queries, on average."""
    found_TRQE = torch.stack([
        read(attention, query_RQE, text_1KW.expand(len(query_RQE), -1, -1)).float() for text_1KW in texts])
    return max(found_TRQE.var(0).mean().item(), _LEAST_VARIANCE)
