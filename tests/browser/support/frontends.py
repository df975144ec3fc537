"""What differs between the editors of the hosts, asked of the page itself: no editor is known by its version.

Everything else is the same in all of them, and stands in editor.py.
"""

from __future__ import annotations

from playwright.sync_api import Page

# a found node in the list under the search: of the editors whose search is a window, and of those before
SEARCH_OPTION = "[data-testid=result-item], .p-autocomplete-option"
# a panel or a window with the error, missing files and packs among them; toasts
ERROR_MARKS = (
    "[data-testid=error-overlay], .comfy-error-report, .comfy-missing-nodes, .comfy-missing-models, "
    ".p-toast-message-error, .p-toast-message-warn"
)
ERROR_PANEL, ERROR_WINDOW = "[data-testid=error-overlay-see-errors]", ".comfy-error-report"
APP_TOUR = "coach-landing"
APP_COMMAND = "Comfy.ToggleLinear"
TRIES = 10


def has_apps(page: Page) -> bool:
    """Whether this editor can show a graph as an app."""
    return page.evaluate("name => window.app.extensionManager.command.commands.some(one => one.id === name)", APP_COMMAND)


def close_app_tour(page: Page) -> None:
    """Leave the tour that the first app of a visitor begins with."""
    page.get_by_test_id(APP_TOUR).get_by_text("Skip", exact=True).click()
    page.get_by_test_id(APP_TOUR).wait_for(state="detached")


def place_found_node(page: Page) -> None:
    """Put down what was found, in editors where it follows the mouse; in others it lies where the canvas was clicked."""
    for place in range(600, 600 + TRIES):
        page.mouse.move(800, place)
        page.mouse.click(800, place)
        page.wait_for_timeout(500)
        if not page.evaluate("() => window.app.graph._nodes.some(node => node.flags.ghost)"):
            return  # else the click was lost while the search still closed


def error_text(page: Page) -> str:
    """The text of the error that has come up: in a window, or in a panel beside the graph."""
    page.locator(f"{ERROR_PANEL}, {ERROR_WINDOW}").first.wait_for()
    if page.locator(ERROR_WINDOW).count():
        return page.locator(ERROR_WINDOW).inner_text()
    page.locator(ERROR_PANEL).click()
    log = page.get_by_test_id("properties-panel").get_by_text("Exception Message")
    log.wait_for()
    return log.inner_text()


def dismiss_error(page: Page) -> None:
    """Until no error covers the graph."""
    if page.locator(ERROR_WINDOW).count():
        page.keyboard.press("Escape")
    page.locator(f"[data-testid=error-overlay], {ERROR_WINDOW}").wait_for(state="detached")
