"""`benchmarks/gpu.py` at toy sizes: every part runs, and what does not fit or comes too late is named and ends nothing else."""

import importlib
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


def rows(text: str, title: str) -> list[list[str]]:
    """The table below a title, without its head."""
    part = text.split(f"### {title}\n")[1].split("###")[0]
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in part.splitlines() if line.startswith("|")][2:]


def test_every_part_runs_small(gpu, capsys):
    assert gpu.main(["--small", "--minutes", "30"]) == 0
    text = capsys.readouterr().out
    assert "toy sizes: the figures mean nothing" in text and "Not measured" not in text
    assert [row[0] for row in rows(text, "Tokens of a 20-step schedule")] == ["0", "1", "3"]
    assert [row[0] for row in rows(text, "Ways of adding up")] == ["(text only)", "blocks", "tokens", "predictions",
                                                                   "early predictions"]
    assert len(rows(text, "Training")) == 3 and all(float(row[4]) > 1 for row in rows(text, "Training"))
    gaps = {row[0]: float(row[1]) for row in rows(text, "Device against CPU")}
    assert gaps["float32"] < 1e-5 < gaps["float16"] < gaps["bfloat16"] < 1
    assert "4 pictures of the playground" in text


def test_without_a_gpu_nothing_is_claimed(gpu, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1 and "no GPU here; nothing was measured" in capsys.readouterr().out


def test_what_does_not_fit_and_what_comes_too_late_is_named(gpu, monkeypatch):
    def full(bench):
        yield "begun"
        raise torch.cuda.OutOfMemoryError("2 GB more")

    monkeypatch.setitem(gpu.PARTS, "demo", ("Too large", full, 0.1, 1))
    bench = gpu.Bench(gpu.small_sizes(), torch.device("cpu"), torch.float32, True, [])
    assert list(gpu.report(bench, ["demo"], 60))[-2:] == ["begun", "Not measured: does not fit this card."]
    assert list(gpu.report(bench, ["demo"], 0))[-1] == "Not measured: the time was over."
