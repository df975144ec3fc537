"""The shipped workflows: well formed for the nodes of this host, and each runs, on small weights under its own file names.

Their own prompts run: samplers with two or four steps, SD1.5 and SDXL at an eighth of the size, videos with a third of the
frames. ComfyUI's nodes are its own, with one exception: in the graphs for AnimateDiff and for SDXL a test double of
CheckpointLoaderSimple gives a MODEL in SD1.5's layout at a tenth of its width, and an SDXL of few layers.
"""

from __future__ import annotations

import importlib
import itertools
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import folder_paths
import numpy as np
import peers
import pytest
from emma_harness import server_client
from PIL import Image
from sd15_layout import narrow_motion_modules, save_motion_module
from sdxl_text import small_sdxl_loader
from workflow_files import Executor, narrow_checkpoint_loader, save_workflow_files

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
WORKFLOWS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}
ANIMATEDIFF = "ComfyUI-AnimateDiff-Evolved"
ON_SDXL = ("23-train-a-module-sdxl", "38-own-style-sdxl")
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
TITLE_PX, LETTER_PX = 30, 7
FEWER_FRAMES = 3
MOST_PROMPTS = 3
PICTURES = ("SaveImage", "SaveAnimatedWEBP", "PreviewImage", "LossGraphNode")
FACE = "face: choose a photo"  # to an AdaFace of small random weights all faces are alike
# node -> its input, and pictures of which one is not chosen
OTHER_PICTURES = {"LoadImage": ("image", ("example.png", "other.png")),
                  "EMMAPlaygroundPicture": ("picture", ("object-mage", "object-farmer"))}


@pytest.fixture(scope="module")
def files(tiny, pack_import, base_directory):
    save_workflow_files(tiny, pack_import, base_directory)


@pytest.fixture(params=WORKFLOWS)
def name(request):
    return request.param


@pytest.fixture
def workflow(name):
    return WORKFLOWS[name]


@pytest.fixture(scope="module")
def animatediff(host_nodes, pack, host_path, base_directory):
    """AnimateDiff-Evolved, loaded until the last test here, and a motion module."""
    with peers.loaded(host_nodes, host_path, ANIMATEDIFF) as (root,), pytest.MonkeyPatch.context() as patch:
        def animatediff_import(module):
            return importlib.import_module(f"{root.__name__}.{module}")

        narrow_motion_modules(patch, animatediff_import)
        folder = base_directory / "models" / "animatediff_models"
        save_motion_module(animatediff_import, folder / "mm_sd15_v3.safetensors", middle=False)
        yield


@pytest.fixture
def packs(name, request, monkeypatch):
    """The other packs that a graph needs, and a loader of a checkpoint that no small file stands for."""
    if name == "36-own-animatediff":
        request.getfixturevalue("animatediff")
    if name == "36-own-animatediff" or name in ON_SDXL:
        loader = request.getfixturevalue("small_sdxl" if name in ON_SDXL else "narrow_checkpoint")
        monkeypatch.setitem(request.getfixturevalue("host_nodes").NODE_CLASS_MAPPINGS, "CheckpointLoaderSimple", loader)
        request.getfixturevalue("executor").forget()
        yield
        request.getfixturevalue("executor").forget()
    else:
        yield


@pytest.fixture(scope="module")
def narrow_checkpoint(tiny, host_nodes):
    return narrow_checkpoint_loader(tiny, host_nodes)


@pytest.fixture(scope="module")
def small_sdxl(tiny, host_nodes):
    return small_sdxl_loader(tiny, host_nodes)


@pytest.fixture
def infos(workflow, files, packs, host_nodes):
    """The inputs of each node type of the graph, as the editor is told them."""
    types = {node["type"] for node in workflow["nodes"]} - {"MarkdownNote"}
    missing = types - set(host_nodes.NODE_CLASS_MAPPINGS)
    assert not missing, f"this host has no {missing}"
    return {name: {"input": host_nodes.NODE_CLASS_MAPPINGS[name].INPUT_TYPES()} for name in types}


@pytest.fixture
def prompt(workflow, infos, pack_import):
    """The graph's own prompt, made small."""
    prompt = server_client.api_prompt(workflow, infos)
    playground = "EMMAPlayground" in {node["class_type"] for node in prompt.values()}
    pictures = itertools.cycle(("example.png", "other.png"))
    for node in prompt.values():
        inputs = node["inputs"]
        if node["class_type"] == "KSampler":
            inputs["steps"] = 4 if playground else 2
        elif node["class_type"] == "EMMATrainModule":
            inputs |= {"steps": 3, "accumulate": 1, "rate": 0.02, "sample_every": 0}  # updates that show
        elif node["class_type"] == "EMMAPromptList" and not playground:
            inputs["prompts"] = "\n".join(inputs["prompts"].splitlines()[:MOST_PROMPTS])
        elif node["class_type"] in ("EmptyLatentImage", "ImageScale") and not playground:
            inputs |= {"width": inputs["width"] // 8, "height": inputs["height"] // 8}
            if isinstance(inputs.get("batch_size"), int):  # and not the number of prompts
                inputs["batch_size"] = -(-inputs["batch_size"] // FEWER_FRAMES)
        elif node["class_type"] == "EMMALoadTrainingFolder" and not playground:
            inputs["resolution"] //= 8
        elif node["class_type"] == "EMMABlendReferences" and not playground:
            inputs["frames"] = -(-inputs["frames"] // FEWER_FRAMES)
        elif node["class_type"] == "ADE_StandardUniformContextOptions":
            inputs |= {"context_length": inputs["context_length"] // FEWER_FRAMES, "context_overlap": 1}
        elif node["class_type"] == "LoadImage":
            assert inputs["image"] == "example.png", "the one picture that every ComfyUI has"
            inputs["image"] = next(pictures)
    return prompt


@pytest.fixture(scope="module")
def executor(files, host_nodes):
    return Executor()


def test_links_join_existing_sockets_of_one_type(workflow):
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: link for link in workflow["links"]}
    assert len(nodes) == len(workflow["nodes"]) and len(links) == len(workflow["links"])
    assert workflow["last_node_id"] >= max(nodes) and workflow["last_link_id"] >= max(links)
    outgoing = {(node["id"], slot, link) for node in nodes.values() for slot, socket in enumerate(node["outputs"])
                for link in socket["links"] or ()}
    incoming = {(node["id"], slot, socket["link"]) for node in nodes.values() for slot, socket in enumerate(node["inputs"])
                if socket["link"] is not None}
    assert outgoing == {(source, slot, link) for link, source, slot, *_ in links.values()}
    assert incoming == {(target, slot, link) for link, _, _, target, slot, _ in links.values()}
    for _, source, out, target, into, kind in links.values():
        given, taken = nodes[source]["outputs"][out]["type"], nodes[target]["inputs"][into]["type"]
        assert kind in (given, taken) and (taken == "*" or given in taken.split(","))


def test_sockets_and_widget_values_are_those_of_the_nodes(workflow, infos, host_nodes):
    for node in workflow["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        label = f"{node['type']} {node['id']}"
        specs = infos[node["type"]]["input"]
        specs = {**specs["required"], **specs.get("optional", {})}
        assert {socket["name"] for socket in node["inputs"]} <= set(specs), label
        outputs = list(host_nodes.NODE_CLASS_MAPPINGS[node["type"]].RETURN_TYPES)
        assert [socket["type"] for socket in node["outputs"]] == outputs[:len(node["outputs"])], label
        assert node["properties"]["Node name for S&R"] == node["type"]
        assert len(node["widgets_values"]) == sum(widget_values(spec) for spec in specs.values()), label


def widget_values(spec) -> int:
    """How many saved values an input has in the editor: a widget's own, what follows a seed, an upload button."""
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    if not (isinstance(kind, list) or kind in WIDGETS) or options.get("forceInput"):
        return 0
    return 1 + bool(options.get("control_after_generate")) + bool(options.get("image_upload"))


def box(node: dict) -> tuple[float, float, float, float]:
    """Left, top, right and lower edge of a node with its title; of a collapsed one there is the title alone."""
    (left, down), (width, height) = node["pos"], node["size"]
    if node["flags"].get("collapsed"):
        width, height = min(width, 2 * TITLE_PX + LETTER_PX * len(node.get("title", node["type"]))), 0
    return left, down - TITLE_PX, left + width, down + height


def test_nodes_do_not_overlap(workflow):
    boxes = {node.get("title", node["type"]) + f" {node['id']}": box(node) for node in workflow["nodes"]}
    for (first, a), (second, b) in itertools.combinations(boxes.items(), 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, f"{first} lies on {second}"


def test_every_graph_says_what_it_is_and_has_a_thumbnail(name, workflow):
    (note,) = (node for node in workflow["nodes"] if node["type"] == "MarkdownNote")
    assert len(note["widgets_values"][0]) > 200
    thumbnail = FOLDER / f"{name}.jpg"
    with Image.open(thumbnail) as picture:
        picture.load()
        assert picture.format == "JPEG" and min(picture.size) >= 300 and max(picture.size) <= 800
    assert thumbnail.stat().st_size < 100_000


def test_models_are_offered_where_their_nodes_look(workflow, files, packs):
    """What the editor needs to offer a missing file: the chosen name, an address it takes, a folder that the host knows."""
    for node in workflow["nodes"]:
        for model in node["properties"].get("models", ()):
            assert model["name"] in node["widgets_values"], model
            assert model["name"].endswith(".safetensors") and model["url"].startswith("https://huggingface.co/"), model
            assert "/resolve/" in model["url"], model
            assert any((Path(root) / model["name"]).is_file() for root in folder_paths.get_folder_paths(model["directory"]))


def test_it_runs_and_what_it_is_told_reaches_the_picture(name, prompt, executor, base_directory, capsys):
    started = time.monotonic()
    first = Run(executor, prompt, base_directory)
    for title, pictures_BHW3 in first.pictures.items():
        assert pictures_BHW3.std() > 1, f"{title} is of one colour"
    for node, key, value in changes(prompt, first.sampled):
        with changed(node, key, value):
            differs = Run(executor, prompt, base_directory).differs(first)
        assert differs, f"{key} of {node['_meta']['title']} changes no picture"
    for node in prompt.values():
        if node["class_type"] == "EMMASaveModule":
            assert (base_directory / "models" / "emma" / f"{node['inputs']['name']}.safetensors").is_file()
    with capsys.disabled():
        print(f"\n{name}: {time.monotonic() - started:.1f} s")


@pytest.mark.parametrize("name", ["04-story"])
def test_each_prompt_of_the_story_makes_its_own_picture(prompt, executor, base_directory):
    (prompts,) = (node for node in prompt.values() if node["class_type"] == "EMMAPromptList")
    lines = prompts["inputs"]["prompts"].splitlines()
    first = Run(executor, prompt, base_directory).pictures
    for remainder in (0, 1):
        others = ["judge" if row % 2 == remainder else line for row, line in enumerate(lines)]
        with changed(prompts, "prompts", "\n".join(others)):
            second = Run(executor, prompt, base_directory).pictures
        for title, pictures_BHW3 in second.items():
            differs = (pictures_BHW3 != first[title]).any((1, 2, 3)).tolist()
            assert differs == [row % 2 == remainder for row in range(len(lines))], title


@pytest.mark.parametrize("name", ["05-video"])
def test_frames_of_the_video_differ_by_references_and_strengths_alone(prompt, executor, base_directory):
    """Not by their noise: where neither changes, all frames are equal."""
    nodes = {node["class_type"]: node for node in prompt.values()}
    blend, strengths = nodes["EMMABlendReferences"], nodes["EMMAFrameStrengths"]
    ran = Run(executor, prompt, base_directory).pictures["frames"]
    assert len(ran) == strengths["inputs"]["frames"]
    assert all((frame != ran[0]).any() for frame in ran[2:]), "the video stands still"
    with changed(blend, "end_weight", blend["inputs"]["start_weight"]), changed(strengths, "keyframes", "0: 1"):
        still = Run(executor, prompt, base_directory).pictures["frames"]
    assert (still == still[:1]).all()


def changes(prompt: dict, sampled: bool) -> Iterator[tuple[dict, str, str | float]]:
    """(node, input, other value): the prompt, and in a graph that samples each strength and each picture to refer to."""
    for node in prompt.values():
        inputs, kind = node["inputs"], node["class_type"]
        if node["_meta"]["title"] in ("prompt", "prompts", "prompt left", "prompt right"):
            key = next(key for key in ("value", "text", "prompts") if key in inputs)
            yield node, key, "\n".join("princess" for _ in inputs[key].splitlines())
        elif sampled and kind in ("EMMAAssembleModules", "ControlNetApplyAdvanced"):
            yield node, "strength", 0.0
        elif sampled and kind in OTHER_PICTURES and node["_meta"]["title"] != FACE:
            key, names = OTHER_PICTURES[kind]
            yield node, key, next(name for name in names if name != inputs[key])


@contextmanager
def changed(node: dict, key: str, value: str | float) -> Iterator[None]:
    """An input of a prompt's node with another value for a while."""
    given, node["inputs"][key] = node["inputs"][key], value
    yield
    node["inputs"][key] = given


class Run:
    """One run of a prompt, and the pictures it made: those of samplers, or all where nothing is sampled."""

    def __init__(self, executor: Executor, prompt: dict, base: Path):
        outputs = executor.run(prompt)
        self.sampled = any(node["class_type"] == "KSampler" for node in prompt.values())
        self.pictures = {
            prompt[key]["_meta"]["title"]: np.concatenate([frames(base, image) for image in outputs[key]["images"]])
            for key in prompt if prompt[key]["class_type"] in PICTURES and "images" in outputs.get(key, {})
            and (not self.sampled or "KSampler" in ancestors(prompt, key))
        }
        assert self.pictures, "no picture came out"

    def differs(self, other: Run) -> bool:
        """Whether any picture that this run made is another than in that run."""
        return any(not np.array_equal(picture, other.pictures[title]) for title, picture in self.pictures.items())


def ancestors(prompt: dict, key: str) -> set[str]:
    """Node types that a node depends on."""
    sources = [value[0] for value in prompt[key]["inputs"].values() if isinstance(value, list)]
    return {prompt[source]["class_type"] for source in sources}.union(*(ancestors(prompt, source) for source in sources))


def frames(base: Path, image: dict) -> np.ndarray:
    """An output's picture or video, (F, H, W, 3)."""
    with Image.open(base / image["type"] / image["subfolder"] / image["filename"]) as file:
        shown = []
        for index in range(getattr(file, "n_frames", 1)):
            file.seek(index)
            shown.append(np.asarray(file.convert("RGB"), dtype=np.float32))
    return np.stack(shown)
