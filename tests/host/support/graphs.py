"""Graphs through a running server."""

from __future__ import annotations

import time


def run_graph(server, graph: dict[str, tuple[str, dict]], limit_s: float = 240) -> dict:
    """The history of a graph {id: (node, inputs)} that ran without an error."""
    prompt = {key: {"class_type": node, "inputs": inputs} for key, (node, inputs) in graph.items()}
    status, answer = server.post_json("/prompt", {"prompt": prompt})
    assert status == 200, answer
    deadline = time.monotonic() + limit_s
    while not (history := server.get_json(f"/history/{answer['prompt_id']}")):
        assert time.monotonic() < deadline, f"no answer after {limit_s} s"
        time.sleep(0.2)
    outcome = history[answer["prompt_id"]]
    assert outcome["status"]["status_str"] == "success", outcome["status"]
    return outcome
