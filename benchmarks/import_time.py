"""Time that loading the pack takes in a ComfyUI, once its own nodes are there.

    python benchmarks/import_time.py ~/ComfyUI          (with a Python that runs that ComfyUI)

Each repeat is a fresh process; the first one also writes byte code and is left out.
"""

import argparse
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
started = time.perf_counter()
loaded = asyncio.run(nodes.load_custom_node(pack))
print("seconds", time.perf_counter() - started if loaded else "failed")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("host", type=Path, help="a ComfyUI folder")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    times_ms = []
    with tempfile.TemporaryDirectory() as base:
        for name in ("custom_nodes", "input", "output", "temp", "user", "models"):
            (Path(base) / name).mkdir()
        for _ in range(options.repeats + 1):
            command = [sys.executable, "-c", CHILD, str(options.host.expanduser()), str(PACK), base]
            finished = subprocess.run(command, capture_output=True, text=True)
            line = next(line for line in finished.stdout.splitlines() if line.startswith("seconds"))
            times_ms.append(float(line.split()[1]) * 1000)
    print(f"median {statistics.median(times_ms[1:]):.0f} ms, {min(times_ms[1:]):.0f} to {max(times_ms[1:]):.0f} ms; "
          f"first {times_ms[0]:.0f} ms")


if __name__ == "__main__":
    main()
