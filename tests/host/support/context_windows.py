"""The host's own context windows: what its node takes, and over what it can run them, asked of the host itself."""

from __future__ import annotations

import inspect

import pytest
from tiny_models import WIDTH, empty_latent, noise

USUAL = {"context_schedule": "standard_static", "context_stride": 1, "closed_loop": False, "fuse_method": "pyramid"}
NODE = "ContextWindowsManual"
FRAMES = 4
NO_WINDOWS = "without us too: this host compares sigmas of unequal lengths when windows run over the batch"


def takes(host_nodes, name: str) -> bool:
    """Whether this host's Context Windows (Manual) has an input of this name."""
    return name in inspect.signature(host_nodes.NODE_CLASS_MAPPINGS[NODE].execute).parameters


@pytest.fixture(scope="session")
def windowed(run_node, host_nodes):
    """`windowed(model, length, dim, ...)`: Context Windows (Manual), with those of further settings that this host takes."""

    def run(model, length: int, dim: int, **further):
        settings = {name: value for name, value in {"freenoise": False, **further}.items() if takes(host_nodes, name)}
        return run_node(NODE, model=model, context_length=length, context_overlap=2, dim=dim, **USUAL, **settings)[0]

    return run


@pytest.fixture(scope="session")
def windows_run_over_the_batch(tiny, windowed, ksample) -> bool:
    """Whether this host samples a batch in windows at all, without us."""
    text = [[noise((1, 4, WIDTH), 1), {}]]
    try:
        ksample(windowed(tiny.model(), 3, 0), text, text, empty_latent(FRAMES), steps=2)
    except RuntimeError:
        return False
    return True
