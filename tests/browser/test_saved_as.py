"""A Save node shows on itself under which name its file lies, and a Load node reads a file that was replaced."""

from __future__ import annotations

SHOWN = """id => {
    const node = window.app.graph.getNodeById(id);
    return [...(node.widgets ?? []).map(widget => String(widget.value ?? "")), document.body.innerText].join("\\n");
}"""


def test_save_nodes_show_the_name_of_their_file(open_editor):
    editor = open_editor()
    editor.clear()
    world, save = editor.add_node("EMMAPlayground"), editor.add_node("EMMASaveModule")
    editor.connect(world, "style module", save, "module")
    for number in (1, 2):
        # another world is loaded, else the second run would be the first one's
        if number == 2:
            editor.page.evaluate("id => { const node = window.app.graph.getNodeById(id);"
                                 " node.widgets.find(widget => widget.name === 'title').value = 'again'; }", save)
        editor.run()
        name = "saved as module.safetensors" if number == 1 else "saved as module_2.safetensors"
        editor.page.wait_for_function(f"id => ({SHOWN})(id).includes('{name}')", arg=save, timeout=20_000)
    editor.screenshot("saved-as")
    assert not editor.shows_error() and not editor.new_complaints() and not editor.red_nodes()
