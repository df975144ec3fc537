"""Connector and modules against answers of independent implementations."""

import json

import pytest
import torch
from reference_answers import TOLERANCE, emma_module_metadata, filled, part, read, relative_error
from safetensors.torch import save_file

from emma_core import Assembly, Reference, load_connector, load_module


@pytest.fixture(scope="module")
def small_connector(tmp_path_factory):
    tensors, _ = read("ella_small")
    path = tmp_path_factory.mktemp("ella") / "small.safetensors"
    save_file(part(tensors, "weights."), str(path), metadata={"ella": json.dumps({"heads": 4})})
    return load_connector(path)


@pytest.fixture(scope="module")
def emma_answers(tmp_path_factory):
    tensors, metadata = read("emma_small")
    modules = {}
    for name in ("style", "object"):
        path = tmp_path_factory.mktemp("emma") / f"{name}.safetensors"
        save_file(part(tensors, f"module.{name}."), str(path),
                  metadata=emma_module_metadata(metadata["modules"], name))
        modules[name] = load_module(path)
    return tensors, metadata, modules


def test_small_ella_gives_the_reference_tokens(small_connector):
    answers, _ = read("ella_small")
    for timestep, wanted_BKW in zip(answers["timesteps"], answers["tokens"], strict=True):
        found_BKW = small_connector.tokens(answers["text"], timestep)
        assert relative_error(found_BKW, wanted_BKW) <= TOLERANCE


def test_released_size_gives_the_reference_tokens(tmp_path):
    answers, metadata = read("ella_sd15")
    weights = filled(json.loads(metadata["keys"]))
    assert sum(value.numel() for value in weights.values()) == 66_820_608
    save_file(weights, str(tmp_path / "ella.safetensors"))
    connector = load_connector(tmp_path / "ella.safetensors")
    for timestep, wanted_BKW in zip(answers["timesteps"], answers["tokens"], strict=True):
        assert relative_error(connector.tokens(answers["text"], timestep), wanted_BKW) <= TOLERANCE


@pytest.mark.parametrize("case", ["text_only", "style", "object", "assembled", "assembled_weighted", "strength_zero"])
def test_emma_gives_the_reference_tokens(small_connector, emma_answers, case):
    tensors, metadata, modules = emma_answers
    assembly = Assembly(
        Reference(modules[name], part(tensors, f"features.{name}."), strength)
        for name, strength in json.loads(metadata["cases"])[case].items()
    )
    for timestep, wanted_BKW in zip(tensors["timesteps"], tensors[f"tokens.{case}"], strict=True):
        found_BKW = small_connector.tokens(tensors["text"], timestep, assembly)
        assert relative_error(found_BKW, wanted_BKW) <= TOLERANCE


def test_reference_cases_differ_so_that_agreement_means_something(emma_answers):
    tensors, _, _ = emma_answers
    text_only = tensors["tokens.text_only"]
    for case in ("style", "object", "assembled", "assembled_weighted"):
        assert relative_error(tensors[f"tokens.{case}"], text_only) > 100 * TOLERANCE
    assert torch.equal(tensors["tokens.strength_zero"], text_only)
