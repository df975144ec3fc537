"""Running a saved workflow on a ComfyUI server over its HTTP API, with the standard library alone."""

import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Mapping
from typing import Any

_WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
_ONLY_IN_THE_EDITOR = {"Note", "MarkdownNote"}
_POLL_SECONDS = 0.2


class ServerError(Exception):
    """The server refused a graph, or a node in it failed."""


class ComfyClient:
    """A ComfyUI server.

    Args:
        url: for instance ``http://127.0.0.1:8188``.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self._client_id = uuid.uuid4().hex

    def object_info(self) -> dict[str, Any]:
        """What the server knows of every node."""
        return self._get_json("/object_info")

    def run(self, prompt: Mapping[str, Any], timeout_s: float = 600.0) -> dict[str, Any]:
        """Queue a graph in API format and wait; returns the outputs by node id.

        Raises:
            ServerError: the graph was refused, a node failed, or it took longer than ``timeout_s``.
        """
        body = json.dumps({"prompt": prompt, "client_id": self._client_id}).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(f"{self.url}/prompt", body)) as answer:
                prompt_id = json.load(answer)["prompt_id"]
        except urllib.error.HTTPError as refusal:
            raise ServerError(f"the server refused the graph: {refusal.read().decode(errors='replace')}. Check that the pack "
                              "is installed there and up to date.") from refusal
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            entry = self._get_json(f"/history/{prompt_id}").get(prompt_id)
            if entry and entry["status"]["status_str"] == "error":
                raise ServerError(f"a node failed: {_failure(entry['status'])}")
            if entry and entry["status"]["completed"]:
                return entry["outputs"]
            time.sleep(_POLL_SECONDS)
        raise ServerError(f"the graph was not finished after {timeout_s:.0f} s. Look at the server's log.")

    def picture(self, image: Mapping[str, str]) -> bytes:
        """The file of a picture named in an output."""
        query = urllib.parse.urlencode({key: image[key] for key in ("filename", "subfolder", "type")})
        with urllib.request.urlopen(f"{self.url}/view?{query}") as answer:
            return answer.read()

    def _get_json(self, path: str) -> dict[str, Any]:
        with urllib.request.urlopen(self.url + path) as answer:
            return json.load(answer)


def _failure(status: Mapping[str, Any]) -> str:
    for kind, message in status.get("messages", []):
        if kind == "execution_error":
            return f"{message.get('node_type')}: {message.get('exception_message')}"
    return json.dumps(status)


def api_prompt(workflow: Mapping[str, Any], object_info: Mapping[str, Any]) -> dict[str, Any]:
    """A workflow as the editor saves it -> the API format, as the editor's own conversion makes it.

    Covers nodes, links and widgets; not subgraphs, reroutes, primitives, muted or bypassed nodes.

    Raises:
        ServerError: the server does not know a node of the workflow.
    """
    links = {link[0]: (str(link[1]), link[2]) for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in _ONLY_IN_THE_EDITOR:
            continue
        if node["type"] not in object_info:
            raise ServerError(f"the server has no node {node['type']}. Install ComfyUI-EMMA there, and restart it.")
        inputs = _widget_values(node, object_info[node["type"]]["input"])
        for socket in node.get("inputs", []):
            if socket.get("link") is not None:
                inputs[socket["name"]] = list(links[socket["link"]])
        prompt[str(node["id"])] = {
            "class_type": node["type"], "inputs": inputs, "_meta": {"title": node.get("title", node["type"])},
        }
    return prompt


def _widget_values(node: Mapping[str, Any], specs: Mapping[str, Any]) -> dict[str, Any]:
    saved = iter(node.get("widgets_values") or [])
    values = {}
    for name, spec in [*specs.get("required", {}).items(), *specs.get("optional", {}).items()]:
        options = spec[1] if len(spec) > 1 else {}
        if not (isinstance(spec[0], list) or spec[0] in _WIDGET_TYPES) or options.get("forceInput"):
            continue
        value = next(saved, options.get("default"))  # a graph may be older than the widget
        if value is None:
            continue
        values[name] = value
        if options.get("control_after_generate"):
            next(saved)  # what the editor does to a seed after each run
    return values


def node_titled(prompt: Mapping[str, Any], title: str) -> str:
    """Id of the node with this title.

    Raises:
        ServerError: no such node.
    """
    for node_id, node in prompt.items():
        if node["_meta"]["title"] == title:
            return node_id
    raise ServerError(f"the workflow has no node titled {title!r}. Restore workflows/ from the repository.")
