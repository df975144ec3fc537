"""What differs between the editors of the hosts: of 0.3.64 (frontend 1.27) and of 0.33 (frontend 1.49).

Everything else is the same in both, and stands in editor.py.
"""

from __future__ import annotations

import re

from playwright.sync_api import Page


class Frontend127:
    """Until the node search became a window and errors moved into a side panel."""

    search_option = ".p-autocomplete-option"
    finds_by_aliases = False
    has_apps = False
    error_marks = (
        ".comfy-error-report, .comfy-missing-nodes, .comfy-missing-models, .p-toast-message-error, .p-toast-message-warn"
    )

    def place_found_node(self, page: Page) -> None:
        """Nothing: choosing a result puts the node where the canvas was double-clicked."""

    def error_text(self, page: Page) -> str:
        """The text of the error that has come up."""
        return page.locator(".comfy-error-report").inner_text()

    def dismiss_error(self, page: Page) -> None:
        page.keyboard.press("Escape")
        page.locator(".comfy-error-report").wait_for(state="detached")


class Frontend149:
    """With the node search in a window of its own, and errors, missing files among them, in a panel beside the graph."""

    search_option = "[data-testid=result-item]"
    finds_by_aliases = True
    has_apps = True
    error_marks = "[data-testid=error-overlay], .p-toast-message-error, .p-toast-message-warn"

    def place_found_node(self, page: Page) -> None:
        """The chosen node follows the mouse until it is put down."""
        page.mouse.move(800, 600)
        page.mouse.click(800, 600)

    def close_app_tour(self, page: Page) -> None:
        """Leave the tour that the first app of a visitor begins with."""
        page.get_by_test_id("coach-landing").get_by_text("Skip", exact=True).click()
        page.get_by_test_id("coach-landing").wait_for(state="detached")

    def error_text(self, page: Page) -> str:
        page.get_by_test_id("error-overlay-see-errors").click()
        log = page.get_by_test_id("properties-panel").get_by_text("Exception Message")
        log.wait_for()
        return log.inner_text()

    def dismiss_error(self, page: Page) -> None:
        page.locator("[data-testid=error-overlay]").wait_for(state="detached")


def frontend_of(page: Page):
    """The differences of the frontend that this page runs."""
    version = page.evaluate("() => window.__COMFYUI_FRONTEND_VERSION__")
    major, minor = map(int, re.match(r"(\d+)\.(\d+)", version).groups())
    return Frontend149() if (major, minor) >= (1, 40) else Frontend127()
