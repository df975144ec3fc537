"""Time that loading the pack takes in a ComfyUI, once its own nodes are there.

    python benchmarks/import_time.py ~/ComfyUI                       (with a Python that runs that ComfyUI)
    python benchmarks/import_time.py ~/ComfyUI --against CHECKOUT    (and another checkout of the pack, in turns)

Each repeat is a fresh process; the first one also writes byte code and is left out. Time of the processor is what the pack
needs, whatever else the machine does.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PACK = Path(__file__).resolve().parents[1]
CHILD = """
import asyncio, logging, sys, time
host, pack, base = sys.argv[1:]
sys.path.insert(0, host)
sys.argv = ["main.py", "--cpu", "--base-directory", base]
import comfy.options
comfy.options.enable_args_parsing()
import utils.extra_config
import nodes, server
server.PromptServer(asyncio.new_event_loop())
logging.disable(logging.CRITICAL)
asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
started, before = time.perf_counter(), time.process_time()
loaded = asyncio.run(nodes.load_custom_node(pack))
print("seconds", time.perf_counter() - started, time.process_time() - before, loaded)
"""


def loading_ms(host: Path, pack: Path, folder: Path) -> tuple[float, float]:
    """Time by the clock, and of the processor, of one process; byte code is kept in a folder."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(folder / "byte code")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    finished = subprocess.run([sys.executable, "-c", CHILD, str(host), str(pack), str(folder)], capture_output=True, text=True,
                              env=environment)
    line = next(line for line in finished.stdout.splitlines() if line.startswith("seconds"))
    _, clock, processor, loaded = line.split()
    if loaded != "True":
        raise SystemExit(f"{pack} could not be loaded:\n{finished.stderr[-2000:]}")
    return float(clock) * 1000, float(processor) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("host", type=Path, help="a ComfyUI folder")
    parser.add_argument("--against", type=Path, help="another checkout of the pack")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    packs = [PACK, *([options.against.resolve()] if options.against else [])]
    times: dict[Path, list[tuple[float, float]]] = {pack: [] for pack in packs}
    with tempfile.TemporaryDirectory() as base:
        for name in ("custom_nodes", "input", "output", "temp", "user", "models"):
            (Path(base) / name).mkdir()
        for _ in range(options.repeats + 1):
            for pack in packs:
                times[pack].append(loading_ms(options.host.expanduser(), pack, Path(base)))
    for pack, found in times.items():
        clocks, processors = zip(*found[1:], strict=True)
        print(f"{pack.name}: median {statistics.median(clocks):.0f} ms by the clock ({min(clocks):.0f} to {max(clocks):.0f}), "
              f"{statistics.median(processors):.0f} ms of the processor ({min(processors):.0f} to {max(processors):.0f})")


if __name__ == "__main__":
    main()
