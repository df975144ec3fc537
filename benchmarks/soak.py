"""Hours of work in a real ComfyUI: many prompts, some interrupted, models unloaded now and then. Same bits? Growing memory?

The graph is workflows/01-first-picture.json on the playground, smaller and with few steps. One picture is drawn at the
beginning and again after every hundred prompts: its bytes must not change. Memory is the resident one of the server's process,
after models were unloaded; the slope is that of a line through these figures, without the first fifth.

    python benchmarks/soak.py --prompts 1000 --comfyui ~/ComfyUI
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from harness.hosts import find_hosts, host_python  # noqa: E402
from harness.server import SERVER_NEEDS, HostServer  # noqa: E402
from harness.server_client import ComfyClient, ServerError, api_prompt, node_titled  # noqa: E402

WORKFLOW = ROOT / "workflows" / "01-first-picture.json"
WORDS = ("man cook", "woman farmer", "princess", "astronaut", "(man:1.3) judge", "")
REFERENCES = {"style reference": ("style-noto", "style-twemoji", "style-fluent-emoji"),
              "face reference": ("face-dark", "face-light", "face-medium")}
SIDE_PX, STEPS = 64, 2
INTERRUPTED, UNLOADED, CHECKED = 10, 25, 100  # every so many prompts
SETTLING = 5  # the first of so many parts of the run, in which caches fill


def main() -> None:
    options = parse_options()
    [host] = find_hosts(options.comfyui)[:1]
    with tempfile.TemporaryDirectory(prefix="emma-soak-", ignore_cleanup_errors=True) as work, \
            HostServer(host, host_python(host, SERVER_NEEDS), Path(work)) as server:
        Soak(server, options.seed).run(options.prompts)


class Soak:
    """One server, its graph, and what was seen."""

    def __init__(self, server: HostServer, seed: int):
        self._client, self._chance = ComfyClient(server.url), random.Random(seed)
        self._process = next(process for process in psutil.Process().children() if "main.py" in process.cmdline())
        self._graph = small(api_prompt(json.loads(WORKFLOW.read_text(encoding="utf-8")), self._client.object_info()))
        self._done: Counter[str] = Counter()
        self._memory: list[tuple[int, float]] = []

    def run(self, prompts: int) -> None:
        """All prompts, then what came of them."""
        started, wanted, changed = time.monotonic(), self._picture(), 0
        for number in range(1, prompts + 1):
            self._draw(self._changed(), interrupted=number % INTERRUPTED == 0)
            if number % UNLOADED == 0:
                self._unload()
                self._memory.append((number, self._process.memory_info().rss / 1e6))
            if number % CHECKED == 0 or number == prompts:
                changed += self._picture() != wanted
                print(f"{number} prompts, {time.monotonic() - started:.0f} s: {dict(self._done)}, the first picture changed "
                      f"{changed} times, {self._memory[-1][1] if self._memory else 0:.0f} MB", flush=True)
        settled = self._memory[len(self._memory) // SETTLING:]
        if len(settled) > 2:
            slope = np.polyfit(*zip(*settled, strict=True), 1)[0]
            print(f"memory: {settled[0][1]:.0f} MB to {settled[-1][1]:.0f} MB, slope {1000 * slope:+.1f} MB in 1,000 prompts")
        if changed:
            raise SystemExit("the picture changed")

    def _draw(self, graph: dict[str, Any], interrupted: bool) -> None:
        timer = threading.Timer(self._chance.uniform(0, 1), self._post, ("/interrupt", {}))
        if interrupted:
            timer.start()
        try:
            self._client.run(graph)
            self._done["drawn"] += 1
        except ServerError:
            if not interrupted:
                raise
            self._done["interrupted"] += 1
        timer.cancel()

    def _changed(self) -> dict[str, Any]:
        graph = copy.deepcopy(self._graph)
        graph[node_titled(graph, "prompt")]["inputs"]["text"] = self._chance.choice(WORDS)
        for title, names in REFERENCES.items():
            graph[node_titled(graph, title)]["inputs"]["picture"] = self._chance.choice(names)
        for title in ("style", "face"):
            graph[node_titled(graph, title)]["inputs"]["strength"] = self._chance.choice((0.0, 0.5, 1.0, 1.5))
        for node in graph.values():
            if node["class_type"] == "KSampler":
                node["inputs"]["seed"] = self._chance.randrange(1 << 32)
        return graph

    def _picture(self) -> bytes:
        """The file of the graph as it is, drawn anew: another seed before it keeps the host from giving its cached one."""
        other = copy.deepcopy(self._graph)
        for node in other.values():
            if node["class_type"] == "KSampler":
                node["inputs"]["seed"] += 1
        self._client.run(other)
        outputs = self._client.run(self._graph)
        return self._client.picture(outputs[node_titled(self._graph, "picture")]["images"][0])

    def _unload(self) -> None:
        self._post("/free", {"unload_models": True, "free_memory": True})
        self._done["unloaded"] += 1
        time.sleep(1)  # the host does it between prompts

    def _post(self, path: str, content: dict[str, Any]) -> None:
        urllib.request.urlopen(urllib.request.Request(self._client.url + path, json.dumps(content).encode())).close()


def small(graph: dict[str, Any]) -> dict[str, Any]:
    """The graph with small pictures and few steps."""
    for node in graph.values():
        if node["class_type"] == "EmptyLatentImage":
            node["inputs"] |= {"width": SIDE_PX, "height": SIDE_PX}
        elif node["class_type"] == "KSampler":
            node["inputs"]["steps"] = STEPS
    return graph


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--comfyui", metavar="DIR", action="append", default=[], help="use this ComfyUI")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, settings, and moments of interrupts")
    return parser.parse_args()


if __name__ == "__main__":
    main()
