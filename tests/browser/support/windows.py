"""What opens beside the graph: node search, help, templates, saving, the language."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from editor import Editor
from frontends import SEARCH_OPTION
from playwright.sync_api import Locator, TimeoutError

NONSENSE = "qqqqqqqq"  # finds nothing: what is found after it is found for the words alone
MOST_PAGES = 5  # of cards
PATIENCE = 100  # looks, a tenth of a second apart


def open_search(editor: Editor) -> None:
    """Double-click an empty place of the canvas; again if that was lost while another window still closed."""
    page = editor.page
    page.evaluate("() => { window.app.canvas.ds.scale = 1; window.app.canvas.ds.offset = [-50000, 0]; }")
    editor.draw()

    def double_click() -> None:
        page.keyboard.press("Escape")  # one that is open already
        page.locator("[role=dialog]").first.wait_for(state="hidden")
        page.mouse.dblclick(800, 600)

    editor.until(double_click, "() => document.activeElement?.matches('input[role=combobox]')")


def search(editor: Editor, words: str, wanted: str) -> list[str]:
    """Type into the open search; the names it offers, once `wanted` is among them or after some seconds."""
    box = editor.page.locator("input[role=combobox]:focus")
    box.fill(NONSENSE)
    names = _offered(editor, lambda names: wanted not in names)
    assert wanted not in names, "the search offers a node for everything"
    box.fill(words)
    return _offered(editor, lambda names: wanted in names)


def _offered(editor: Editor, enough: Callable[[list[str]], bool]) -> list[str]:
    """The names in the list of results as soon as they are `enough`, or after some seconds."""
    options, names = editor.page.locator(SEARCH_OPTION), []
    for _ in range(PATIENCE):
        names = [text.splitlines()[0].strip() for text in options.all_inner_texts() if text.strip()]
        if enough(names):
            break
        editor.page.wait_for_timeout(100)
    return names


@dataclass(frozen=True)
class HelpPage:
    """A node's help page as it is shown; `first_cells` are those of all tables."""

    title: str
    headings: list[str]
    first_cells: list[str]
    text: str


def open_help(editor: Editor, node_id: int) -> HelpPage:
    """Select a node and press the button that tells about it."""
    editor.select(node_id)
    editor.page.get_by_test_id("info-button").click()
    page = editor.page.locator(".node-help-content").locator("visible=true")
    page.locator("table").first.wait_for()
    return HelpPage(
        title=page.locator("h1").first.inner_text().strip(),
        headings=[heading.strip() for heading in page.locator("h2").all_inner_texts()],
        first_cells=page.locator("tbody td:first-child").all_inner_texts(),
        text=page.inner_text(),
    )


def set_language(editor: Editor, language: str) -> None:
    """As the settings window does. Texts of nodes change when the page is loaded again."""
    with editor.page.expect_response(lambda answer: answer.url.endswith("/settings/Comfy.Locale") and answer.ok):
        editor.page.evaluate("language => window.app.extensionManager.setting.set('Comfy.Locale', language)", language)


def node_texts(editor: Editor, node_id: int) -> dict:
    """A node's title, and the names of its inputs as they are written on it."""
    return editor.page.evaluate("""id => {
        const node = window.app.graph.getNodeById(id);
        const widgets = Object.fromEntries((node.widgets ?? []).map(widget => [widget.name, widget.label ?? widget.name]));
        const inputs = node.inputs.map(input => [input.name,
            widgets[input.name] ?? input.label ?? input.localized_name ?? input.name]);
        return { title: node.title, inputs: Object.fromEntries(inputs) };
    }""", node_id)


def tooltip_of_input(editor: Editor, node_id: int, name: str) -> str:
    """What comes up when the mouse rests on an input's dot."""
    editor.show_node(node_id)
    right, down = editor.page.evaluate("""([id, name]) => {
        const node = window.app.graph.getNodeById(id), [x, y] = node.getConnectionPos(true, node.findInputSlot(name));
        return [x - node.pos[0], y - node.pos[1]];
    }""", [node_id, name])
    x, y = editor.place_of(node_id, right, down)
    editor.page.mouse.move(x + 30, y + 100)
    editor.page.mouse.move(x + 12, y, steps=5)
    tooltip = editor.page.locator(".node-tooltip")
    tooltip.wait_for()
    return tooltip.inner_text().strip()


def open_templates(editor: Editor, pack: str) -> None:
    """Open the window from the side bar and choose a pack's own page."""
    editor.page.get_by_role("button", name="Templates", exact=True).first.click()
    editor.page.locator("[role=dialog]").get_by_text(pack, exact=True).first.click()
    editor.page.locator("[role=dialog] [data-testid^=template-workflow-] img").first.wait_for()
    editor.page.wait_for_load_state("networkidle")


def template_cards(editor: Editor) -> dict[str, int]:
    """The cards of the open page: name of the graph -> width of its picture, 0 where none came.

    The editor makes more cards once the page is scrolled to its end, until there are no more.
    """
    cards = editor.page.locator("[role=dialog] [data-testid^=template-workflow-]")
    widths: dict[str, int] = {}
    for _ in range(MOST_PAGES):
        found = cards.all()
        for card in found[len(widths):]:
            widths[(card.get_attribute("data-testid") or "").removeprefix("template-workflow-")] = _width_of_picture(card)
        found[-1].hover()
        editor.page.mouse.wheel(0, 10_000)
        try:
            cards.nth(len(found)).wait_for(timeout=2000)
        except TimeoutError:
            break
    return widths


def _width_of_picture(card: Locator) -> int:
    """In pixels; 0 where none came."""
    card.scroll_into_view_if_needed()  # pictures are loaded once they come into sight
    for _ in range(PATIENCE):
        width = card.evaluate("card => card.querySelector('img')?.naturalWidth ?? 0")
        if width:
            return width
        card.page.wait_for_timeout(100)
    return 0


def choose_template(editor: Editor, name: str) -> None:
    """Click a card, and wait until its graph is on the canvas."""
    editor.page.locator("[role=dialog]").get_by_test_id(f"template-workflow-{name}").click()
    editor.page.locator("[role=dialog]").first.wait_for(state="hidden")
    editor.draw()


def write_prompt(editor: Editor, text: str) -> None:
    """Type into the first text field on the canvas, then click beside the graph: only then does the editor take note."""
    editor.page.locator("textarea.comfy-multiline-input").first.click()
    editor.page.keyboard.press("Control+a")
    editor.page.keyboard.type(text)
    editor.page.mouse.click(1450, 400)


def save_as(editor: Editor, name: str) -> None:
    """Ctrl+S, a name, Enter."""
    editor.until(lambda: editor.page.keyboard.press("Control+s"), "() => document.activeElement?.closest('[role=dialog]')")
    editor.page.keyboard.press("Control+a")
    editor.page.keyboard.type(name)
    with editor.page.expect_response(lambda answer: "/userdata/" in answer.url and answer.request.method == "POST"):
        editor.page.keyboard.press("Enter")


def open_saved(editor: Editor, name: str) -> None:
    """Choose a graph in the side bar's list of saved ones."""
    editor.page.get_by_role("button", name="Workflows (w)").first.click()
    with editor.page.expect_response(lambda answer: "/userdata/" in answer.url and answer.ok):
        editor.page.get_by_text(name).first.click()
    editor.page.wait_for_load_state("networkidle")
    editor.draw()
