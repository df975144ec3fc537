"""The command line of `run.py`."""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .environment import ROOT, SetupError, ensure_base_environment, say
from .hosts import find_hosts, host_python
from .registry import run_pack
from .server import SERVER_NEEDS, HostServer
from .suites import run_tests


def main(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a folder's name may be more than the terminal can show
    parser = command_parser()
    options, further = parser.parse_known_args(arguments)
    try:
        if options.command == "test":
            return run_tests(options.comfyui, further, slow=options.slow, jobs=options.jobs)
        if further:
            parser.error(f"unknown arguments: {' '.join(further)}")
        out = checked_place(options.out)
        return run_pack(out) if options.command == "pack" else run_demo(out, options)
    except SetupError as error:
        say(f"\n{error}")
        return 1
    except KeyboardInterrupt:
        say("\nStopped.")
        return 130


def command_parser() -> argparse.ArgumentParser:
    """`demo`, `test` and `pack`, with the options each takes."""
    parser = argparse.ArgumentParser(prog="run.py", allow_abbrev=False, description="Sets up what it needs, then:")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", allow_abbrev=False, help="make a contact sheet of prompts and references")
    demo.add_argument("--out", metavar="FILE", default="emma-demo.png", help="default: %(default)s")
    where = demo.add_mutually_exclusive_group()
    where.add_argument("--comfyui", metavar="DIR", action="append", default=[], help="use this ComfyUI")
    where.add_argument("--bare", action="store_true", help="without ComfyUI, even if one is found")
    test = commands.add_parser("test", allow_abbrev=False, help="run all tests; further arguments go to pytest")
    test.add_argument(
        "--comfyui", metavar="DIR", action="append", default=[], help="test in this ComfyUI alone (may be given again)"
    )
    test.add_argument("--slow", action="store_true", help="also the core tests at full size (minutes, 10 GB of memory)")
    test.add_argument("--jobs", type=int, metavar="N", default=min(2, os.cpu_count() or 1),
                      help="suites to run at the same time (default here: %(default)s)")
    pack = commands.add_parser("pack", allow_abbrev=False, help="validate and pack what the Comfy registry would publish")
    pack.add_argument("--out", metavar="FILE", default="node.zip", help="default: %(default)s")
    return parser


def checked_place(out: str) -> Path:
    """The file to write. Raises SetupError if its folder is not there."""
    place = Path(out).resolve()
    if not place.parent.is_dir():
        raise SetupError(f"--out: there is no folder {place.parent}; make it first, or choose another.")
    return place


def run_demo(out: Path, options: argparse.Namespace) -> int:
    """The demo through a real ComfyUI server where there is one, else with emma_core alone."""
    hosts = [] if options.bare else find_hosts(options.comfyui)
    python = ensure_base_environment()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the pictures are so small that two threads take longer than one
    command = [str(python), "-m", "lab.demo", "--out", str(out)]
    if not hosts:
        say("Running without ComfyUI" + ("" if options.bare else " (none found; set COMFYUI_PATH to use one)"))
        return subprocess.run(command, cwd=ROOT, env=child_environment()).returncode
    host = hosts[0]
    say(f"Starting {host.label} (--bare runs without it)")
    server_python = host_python(host, SERVER_NEEDS)
    with (
        tempfile.TemporaryDirectory(prefix="emma-demo-", ignore_cleanup_errors=True) as work_dir,
        HostServer(host, server_python, Path(work_dir), extra_arguments=["--use-pytorch-cross-attention"]) as server,
    ):
        return subprocess.run([*command, "--server", server.url], cwd=ROOT, env=child_environment()).returncode


def child_environment() -> dict[str, str]:
    """This process's environment, with idle threads sleeping and text as UTF-8."""
    return {"OMP_WAIT_POLICY": "passive", "PYTHONUTF8": "1", **os.environ}
