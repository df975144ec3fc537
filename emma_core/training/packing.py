"""Tensors of a checkpoint in fewer bytes, bit for bit.

What float32 numbers of a network have in common is in their exponents: the bytes of a tensor are sorted into four planes, and
those planes that a Huffman code makes shorter are coded. Averaged weights are kept as their distance from the weights.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

_PLANES, _SHAPE, _CODED = "byte planes of float32", "shape", "coded"
_FEWEST = 1024  # numbers of a tensor that is worth it
_LOOKED_AT = 1 << 16  # bytes of a plane that tell whether it can be made shorter
_WORTH = 0.97


def packed(state: Mapping[Any, Any], near: Mapping[Any, Any] | None = None) -> dict[Any, Any]:
    """The same tree, its larger float32 tensors packed.

    Args:
        near: tensors of the same names and shapes that these are close to.
    """
    found = {}
    for key, value in state.items():
        beside = (near or {}).get(key)
        if isinstance(value, Mapping):
            found[key] = packed(value, beside)
        elif isinstance(value, torch.Tensor) and value.dtype == torch.float32 and value.numel() >= _FEWEST:
            found[key] = _planes_of(value, beside)
        else:
            found[key] = value
    return found


def unpacked(state: Mapping[Any, Any], near: Mapping[Any, Any] | None = None) -> dict[Any, Any]:
    """What was given to `packed`; tensors that are not packed stay.

    Raises:
        ValueError: planes that do not make a tensor of the shape that is beside them.
    """
    found = {}
    for key, value in state.items():
        beside = (near or {}).get(key)
        if isinstance(value, Mapping):
            found[key] = _tensor_of(value, beside) if _PLANES in value else unpacked(value, beside)
        else:
            found[key] = value
    return found


def _planes_of(tensor: torch.Tensor, near: torch.Tensor | None) -> dict[str, Any]:
    word_N = _words(tensor)
    with np.errstate(over="ignore"):
        if near is None:
            word_N = (word_N << 1) | (word_N >> 31)  # the exponent alone in the highest byte
        else:
            distance_N = (word_N - _words(near)).view(np.int32)
            word_N = ((distance_N << 1) ^ (distance_N >> 31)).view(np.uint32)  # small ones of both signs begin with zeros
    plane_4N = np.ascontiguousarray(word_N.view(np.uint8).reshape(-1, 4).T)
    coded = [_shrinks(plane_N) for plane_N in plane_4N]
    planes = [_bytes(_coded(plane_N)) if code else torch.from_numpy(plane_N)
              for plane_N, code in zip(plane_4N, coded, strict=True)]
    return {_PLANES: planes, _SHAPE: list(tensor.shape), _CODED: coded}


def _tensor_of(node: Mapping[str, Any], near: torch.Tensor | None) -> torch.Tensor:
    try:
        count = math.prod(node[_SHAPE])
        plane_4N = np.stack([_decoded(plane, count) if code else plane.numpy()
                             for plane, code in zip(node[_PLANES], node[_CODED], strict=True)])
        word_N = np.ascontiguousarray(plane_4N.T).view(np.uint32).reshape(count)
        if near is None:
            word_N = (word_N >> 1) | (word_N << 31)
        else:
            word_N = _words(near) + ((word_N >> 1) ^ -(word_N & 1).view(np.int32).astype(np.int32)).astype(np.uint32)
        return torch.from_numpy(word_N.view(np.float32)).reshape(node[_SHAPE])
    except (KeyError, TypeError, AttributeError, RuntimeError, OverflowError, MemoryError, zlib.error) as found:
        raise ValueError(f"packed numbers that cannot be read ({type(found).__name__})") from found


def _words(tensor: torch.Tensor) -> np.ndarray:
    """The bits of each number."""
    return tensor.detach().cpu().contiguous().reshape(-1).numpy().view(np.uint32)


def _shrinks(plane_N: np.ndarray) -> bool:
    sample = plane_N[:_LOOKED_AT]
    return len(_coded(sample)) < _WORTH * len(sample)


def _coded(plane_N: np.ndarray) -> bytes:
    # looking for repetitions finds none, and takes twice the time
    coder = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(plane_N) + coder.flush()


def _decoded(plane: torch.Tensor, count: int) -> np.ndarray:
    """At most one byte more than ``count``, however much the code claims."""
    if count > 8 * plane.numel():  # a Huffman code takes a bit for a byte at least
        raise ValueError(f"{plane.numel()} bytes of code for {count} numbers")
    content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(plane.numpy(), count + 1)
    return np.frombuffer(content, np.uint8)


def _bytes(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
