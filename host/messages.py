"""Lines that the editor shows on a node."""

import sys


def show_on_node(text: str, node_id: str | None) -> None:
    """Show a text on a node in the editor that queued it. A host without a server, as in tests, shows nothing."""
    # the host's module is there if it serves an editor; importing it would take seconds
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id, server.client_id)
