"""Starts a real ComfyUI with the pack loaded, and stops it. Nothing is written into the ComfyUI folder."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from .environment import ROOT, SetupError
from .hosts import HOST_VENVS, Host

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 15.0
PROBE_NODE = "EMMAConnector"
SERVER_NEEDS = ("torch", "aiohttp", "einops", "comfyui_frontend_package")


class HostServer:
    """A ComfyUI server as a context manager.

    `work_dir` becomes the host's base directory: models, input, output, temp and user live under it, and of all node
    packs only `pack_dir` is loaded, from where it is, with those of its neighbours that `further_packs` names. `url`
    answers while the context is open. Entering raises SetupError with the end of the server's log if the server does
    not start or the pack's nodes are not there.
    """

    def __init__(
        self,
        host: Host,
        python: Path,
        work_dir: Path,
        pack_dir: Path = ROOT,
        extra_arguments: Sequence[str] = (),
        further_packs: Sequence[str] = (),
    ) -> None:
        self.host = host
        self.python = python
        self.pack_dir = pack_dir
        self.work_dir = work_dir.resolve()
        self.input_dir = self.work_dir / "input"
        self.output_dir = self.work_dir / "output"
        self.models_dir = self.work_dir / "models"
        self.log_path = self.work_dir / "server.log"
        self.url = ""
        self._extra_arguments = tuple(extra_arguments)
        self._packs = (pack_dir.name, *further_packs)
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> HostServer:
        prepare_base_directory(self.work_dir)
        paths_file = self.work_dir / "pack_paths.yaml"
        # JSON is YAML, and quotes whatever a path may hold.
        paths_file.write_text(json.dumps({"emma": {"custom_nodes": str(self.pack_dir.parent)}}), encoding="utf-8")
        port = str(free_port())
        self.url = f"http://127.0.0.1:{port}"
        command = [str(self.python), "main.py", "--listen", "127.0.0.1", "--port", port]
        command += [*isolated_arguments(self.work_dir), "--disable-auto-launch", "--disable-api-nodes"]
        command += ["--extra-model-paths-config", str(paths_file)]
        command += ["--disable-all-custom-nodes", "--whitelist-custom-nodes", *self._packs]
        command += self._extra_arguments
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=self.host.path, env=host_environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            self._wait_until_up()
            self._require_pack()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server's process; harmless when it has ended."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def get_json(self, path: str):
        """The parsed answer to GET `path`."""
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def post_json(self, path: str, content) -> tuple[int, dict]:
        """The status and the parsed answer to POST `path`; a refusal's answer too."""
        request = urllib.request.Request(self.url + path, json.dumps(content).encode())
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as refusal:
            return refusal.code, json.load(refusal)

    def log_tail(self, lines: int = 30) -> str:
        """The last lines the server printed."""
        return "\n".join(self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                raise SetupError(f"{self.host.label} ended while starting. The end of its log:\n{self.log_tail()}")
            try:
                self.get_json("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.25)
        raise SetupError(
            f"{self.host.label} did not answer within {START_TIMEOUT_S:.0f} s. The end of its log:\n{self.log_tail()}"
        )

    def _require_pack(self) -> None:
        if PROBE_NODE not in self.get_json(f"/object_info/{PROBE_NODE}"):
            raise SetupError(
                f"{self.host.label} started, but the pack in {self.pack_dir} did not load: node {PROBE_NODE} is "
                f"missing. The end of the log:\n{self.log_tail()}"
            )


def isolated_arguments(work_dir: Path) -> list[str]:
    """ComfyUI's arguments that run it on the CPU and keep everything it writes under `work_dir`."""
    arguments = ["--cpu", "--base-directory", str(work_dir), "--database-url"]
    return [*arguments, f"sqlite:///{(work_dir / 'comfyui.db').as_posix()}"]


def prepare_base_directory(work_dir: Path) -> None:
    """Make the folders a ComfyUI base directory has, and skip the editor's first-visit dialog."""
    for name in ("custom_nodes", "input", "output", "temp", "user/default", "models"):
        (work_dir / name).mkdir(parents=True, exist_ok=True)
    settings = work_dir / "user" / "default" / "comfy.settings.json"
    settings.write_text('{"Comfy.TutorialCompleted": true}', encoding="utf-8")


def host_environment() -> dict[str, str]:
    """This process's environment for a ComfyUI process: byte code goes beside our environments, not into its folder."""
    environment = {"OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", **os.environ}
    environment["PYTHONPYCACHEPREFIX"] = str(HOST_VENVS / "pycache")
    return environment


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
