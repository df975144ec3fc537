"""Files under the host: names that no system refuses, replaced files that are read again, short words for what is wired."""

from __future__ import annotations

import errno
import os

import pytest
import torch

WINDOWS_NAMES = ["nul", "NUL.safetensors", "people/con", "com1.x", "lpt9", "a:b", "C:/x", "a?b", "a*", "a<b>", 'a"b', "a|b",
                 "ends.", "people./ada", "tab\tname", "nul\0byte", "escape\x1b[2J", "x" * 240, "字" * 90, "half \ud800"]


@pytest.fixture
def reference(pack_import):
    features = pack_import("emma_core.model.reference_features").ReferenceFeatures
    return features({"global": torch.rand(1, 1, 128)}, {"family": "clip-miniature"})


@pytest.fixture
def module(tiny):
    return tiny.module("style", {"global": (128, 4)})


@pytest.mark.parametrize("name", WINDOWS_NAMES)
def test_names_that_are_none_on_some_system_are_refused(run_node, reference, module, pack_import, base_directory, name):
    before = sorted((base_directory / "models").rglob("*"))
    for node, inputs in (("EMMASaveReference", {"reference": reference}), ("EMMASaveModule", {"module": module})):
        with pytest.raises(pack_import("emma_core.errors").FileError, match="file's name"):
            run_node(node, **inputs, name=name)
    assert sorted((base_directory / "models").rglob("*")) == before


@pytest.mark.parametrize(("number", "found"), [
    (errno.ENOSPC, "the disk is full. Make room there"), (errno.EROFS, "the disk is read-only. Make it writable"),
    (errno.EACCES, "there is no permission"), (errno.ENAMETOOLONG, "the name is too long. Shorten it"),
])
def test_a_disk_that_takes_no_more_is_told_by_the_save_nodes(
    run_node, reference, module, pack_import, base_directory, monkeypatch, number, found
):
    """At the last moment, when the file would get its name: nothing is left, and what has this name stays."""
    def refuse(old, new):
        raise OSError(number, os.strerror(number))

    models, before = base_directory / "models", {}
    for folder in ("emma", "emma_references"):
        (models / folder).mkdir(parents=True, exist_ok=True)
        before |= {path: path.read_bytes() for path in (models / folder).rglob("*") if path.is_file()}
    monkeypatch.setattr("os.replace", refuse)
    for node, inputs in (("EMMASaveReference", {"reference": reference}), ("EMMASaveModule", {"module": module})):
        with pytest.raises(pack_import("emma_core.errors").FileError, match=f"full-disk.* cannot be written: {found}"):
            run_node(node, **inputs, name="full-disk")
    assert {path: path.read_bytes() for folder in ("emma", "emma_references") for path in (models / folder).rglob("*")
            if path.is_file()} == before


def test_a_folder_that_cannot_be_made_is_told_by_the_save_nodes(run_node, reference, module, pack_import, base_directory):
    for folder, node, inputs in (("emma_references", "EMMASaveReference", {"reference": reference}),
                                 ("emma", "EMMASaveModule", {"module": module})):
        (base_directory / "models" / folder).mkdir(parents=True, exist_ok=True)
        (base_directory / "models" / folder / "a-file").write_text("")
        with pytest.raises(pack_import("emma_core.errors").FileError, match="cannot be written: (a file is|it lies below)"):
            run_node(node, **inputs, name="a-file/below/it")


def test_every_load_node_reads_a_replaced_file_again(host_nodes, base_directory):
    """Under the same name, of the same size, with the date set back; also a file of a folder."""
    models, nodes = base_directory / "models", host_nodes.NODE_CLASS_MAPPINGS
    name, folder = "changing.safetensors", models / "text_encoders" / "changing-t5"
    places = {"EMMALoadELLA": (models / "ella" / name, {"ella_name": name}),
              "EMMALoadModule": (models / "emma" / name, {"module_name": name}),
              "EMMALoadReference": (models / "emma_references" / name, {"reference_name": name}),
              "EMMALoadReferenceEncoder": (models / "clip_vision" / name, {"encoder_name": name}),
              "EMMALoadTextEncoder": (folder / "tokenizer.json", {"text_encoder_name": "changing-t5", "dtype": "fp32",
                                                                  "empty_prompt": "natural length"})}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    for node, (path, inputs) in places.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"first")
        status = path.stat()
        first, again = (nodes[node].fingerprint_inputs(**inputs) for _ in range(2))
        path.write_bytes(b"other")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert first == again != nodes[node].fingerprint_inputs(**inputs), node
        path.unlink()
    for node, (path, inputs) in places.items():
        if path.parent != folder:
            assert nodes[node].fingerprint_inputs(**inputs) == "missing", node
    shipped = nodes["EMMALoadReferenceEncoder"].fingerprint_inputs(encoder_name="playground (shipped)")
    assert shipped == nodes["EMMAPlayground"].fingerprint_inputs()
    assert shipped == nodes["EMMAPlaygroundPicture"].fingerprint_inputs(picture="face-dark")


def test_what_travels_through_the_graph_is_shown_short(run_node, reference, module):
    """The host puts what is wired into a failing node into its message and its log."""
    assembly = run_node("EMMAAssembleModules", module=module, reference=reference, strength=1.0, start_percent=0.0,
                        end_percent=1.0)[0]
    world = run_node("EMMAPlayground")
    ours = [value for value in world if type(value).__name__.startswith("Loaded")]
    assert len(ours) == 5
    for shown in (module, reference, assembly, *assembly.references, *ours):
        assert len(str(shown)) < 300 and "tensor(" not in str(shown) and str(shown).startswith("<"), str(shown)[:400]


def test_a_save_node_tells_the_editor_and_the_api_its_files_name(run_node, reference, host_nodes, monkeypatch):
    import server

    told = []
    monkeypatch.setattr(server.PromptServer.instance, "send_progress_text", lambda *words: told.append(words))
    node = host_nodes.NODE_CLASS_MAPPINGS["EMMASaveReference"]
    assert [str(name) for name in node.define_schema().hidden] == ["Hidden.unique_id"]

    class Hidden:
        unique_id = "7"

    monkeypatch.setattr(node, "hidden", Hidden(), raising=False)
    output = node.execute(reference=reference, name="told")
    assert told == [("saved as told.safetensors", "7", server.PromptServer.instance.client_id)]
    assert "saved as told.safetensors" in str(output.ui.as_dict() if hasattr(output.ui, "as_dict") else output.ui)
