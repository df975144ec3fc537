"""Socket types of the pack and what its schemas share."""

import dataclasses

from comfy_api.latest import io, ui

from ..host.messages import show_on_node

CATEGORY = "EMMA"

Ella = io.Custom("ELLA")
Module = io.Custom("EMMA_MODULE")
Encoder = io.Custom("EMMA_ENCODER")
Reference = io.Custom("EMMA_REFERENCE")
Assembly = io.Custom("EMMA_ASSEMBLY")
Teacher = io.Custom("EMMA_TEACHER")
TrainingSet = io.Custom("EMMA_TRAINING_SET")
# what schedule nodes of other packs call a list of numbers
Floats = io.Custom("FLOATS")
HookKeyframes = io.Custom("HOOK_KEYFRAMES")


def advanced(widget: io.Input) -> io.Input:
    """A widget that the editor shows on demand; set afterwards, as the oldest host takes no such argument."""
    widget.extra_dict = {**(widget.extra_dict or {}), "advanced": True}
    return widget


def saved_as(node: type[io.ComfyNode], name: str) -> io.NodeOutput:
    """What a Save node puts out: the name under which its file lies, on the node and for clients of the API."""
    text = f"saved as {name}"
    show_on_node(text, node.hidden and node.hidden.unique_id)
    return io.NodeOutput(ui=ui.PreviewText(text))


def schema(aliases: tuple[str, ...], **values) -> io.Schema:
    """A schema of this pack; `aliases` are further words that the node is found by, on hosts whose search knows them."""
    known = {field.name for field in dataclasses.fields(io.Schema)}
    return io.Schema(category=CATEGORY, **values, **({"search_aliases": list(aliases)} if "search_aliases" in known else {}))
