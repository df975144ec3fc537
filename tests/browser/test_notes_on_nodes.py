"""What a node has to say that stops nothing stands on the node."""

from __future__ import annotations

NOTE = "cropped: of 384 x 128 the encoder sees 128 x 128, 33% of the picture"
SHOWN = """([id, note]) => {
    const node = window.app.graph.getNodeById(id);
    const texts = [...(node.widgets ?? []).map(widget => String(widget.value ?? "")), document.body.innerText];
    return texts.some(text => text.includes(note));
}"""


def test_a_reference_of_which_little_is_seen_says_so(open_editor):
    editor = open_editor()
    editor.clear()
    world, picture, wide = (editor.add_node(name) for name in ("EMMAPlayground", "EMMAPlaygroundPicture", "ImageScale"))
    encode, shown = editor.add_node("EMMAEncodeReference"), editor.add_node("PreviewImage")
    for node, values in ((wide, {"width": 384, "height": 128}), (encode, {"frame": "center"})):
        editor.page.evaluate("""([id, values]) => {
            for (const widget of window.app.graph.getNodeById(id).widgets) widget.value = values[widget.name] ?? widget.value;
        }""", [node, values])
    for origin, output, target, wanted in (
        (picture, "IMAGE", wide, "image"), (wide, "IMAGE", encode, "image"), (world, "style module", encode, "module"),
        (world, "EMMA_ENCODER", encode, "encoder"), (encode, "seen", shown, "images"),
    ):
        editor.connect(origin, output, target, wanted)
    editor.run()
    editor.page.wait_for_function(SHOWN, arg=[encode, NOTE], timeout=20_000)
    editor.show_node(encode)
    editor.screenshot("note-on-a-node")
    assert not editor.shows_error() and not editor.new_complaints() and not editor.red_nodes()
