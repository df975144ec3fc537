"""The editor as a user drives it: mouse and keys for what a user does, `window.app` for what is looked up."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from frontends import ERROR_MARKS
from playwright.sync_api import Page, TimeoutError

# what each host prints without us: no settings or saved graphs yet, no help page for English alone, no network, its default
# graph and its own first steps
HOST_NOISE = re.compile(
    r"/user\.css|/userdata|/favicon\.ico|/docs/\w+/en\.md|Content Security Policy|ERR_NAME_NOT_RESOLVED"
    r"|graph accessed before initialization|^Cannot read properties of undefined \(reading 'id'\)$"
)
TRIES, TRY_MS = 12, 5_000  # of an act that the editor may lose while it is busy, and how long each is given
LARGE_WINDOW = {"width": 3840, "height": 2160}
# links, as the editor drew them, on a point inside of a node that is neither of their ends
LINKS_BEHIND_NODES = """() => {
    const graph = window.app.graph, context = document.createElement("canvas").getContext("2d"), found = new Set();
    const title = id => { const node = graph.getNodeById(id); return `${node.id} ${node.title}`; };
    context.lineWidth = 2;
    for (const link of graph.links.values()) {
        const ways = [link.path];
        for (let id = link.parentId; id !== undefined; id = graph.reroutes.get(id).parentId)
            ways.push(graph.reroutes.get(id).path);
        if (ways.some(way => !way)) found.add(`${title(link.origin_id)} -> ${title(link.target_id)} was not drawn`);
        for (const node of graph._nodes) {
            if (node.id === link.origin_id || node.id === link.target_id) continue;
            const [x, y, width, height] = node.boundingRect, edge = [];  // with its title; of a collapsed one its title alone
            for (let right = 0; right <= width; right += 1) edge.push([x + right, y], [x + right, y + height]);
            for (let down = 0; down <= height; down += 1) edge.push([x, y + down], [x + width, y + down]);
            if (ways.some(way => way && edge.some(([right, down]) => context.isPointInStroke(way, right, down))))
                found.add(`${title(link.origin_id)} -> ${title(link.target_id)} behind ${title(node.id)}`);
        }
    }
    return [...found];
}"""
OVERLAPPING_NODES = """() => {
    const found = [], nodes = window.app.graph._nodes;
    for (const one of nodes) for (const other of nodes) {
        const [a, b] = [one.boundingRect, other.boundingRect], apart = side => a[side] + a[side + 2] <= b[side];
        if (one.id < other.id && ![0, 1].some(side => apart(side) || b[side] + b[side + 2] <= a[side]))
            found.push(`${one.title} on ${other.title}`);
    }
    return found;
}"""
# what the window shows: zoom, whether the editor draws texts at it, nodes that reach out of it
VIEW = """() => {
    const canvas = window.app.canvas, [left, top, width, height] = canvas.visible_area;
    const outside = ({ boundingRect: [x, y, w, h] }) => x < left || y < top || x + w > left + width || y + h > top + height;
    return { zoom: canvas.ds.scale, draws_texts: !canvas.low_quality,
        nodes_outside: window.app.graph._nodes.filter(outside).map(node => node.title) };
}"""
READY = "() => window.app?.extensionManager && window.app.graph?._nodes.length"
# brightness of a picture as a node shows it, on a grid of 32 x 32
PICTURE = """([title, size]) => {
    const node = window.app.graph._nodes.find(node => node.title === title);
    const canvas = Object.assign(document.createElement("canvas"), { width: size, height: size });
    const context = canvas.getContext("2d");
    context.drawImage(node.imgs[0], 0, 0, size, size);
    const { data } = context.getImageData(0, 0, size, size);
    return Array.from({ length: size * size }, (_, i) => (data[4 * i] + data[4 * i + 1] + data[4 * i + 2]) / 3);
}"""


@dataclass(frozen=True)
class View:
    """What the window shows of a graph."""

    zoom: float
    draws_texts: bool
    nodes_outside: list[str]


class Editor:
    """One page of the editor, opened.

    Args:
        page: an empty page.
        url: the server's.
        screenshots: where `screenshot` saves, None: nowhere.
    """

    def __init__(self, page: Page, url: str, screenshots: Path | None = None):
        self.page = page
        self._url = url
        self._screenshots = screenshots
        self._complaints: list[str] = []
        page.on("console", self._note_message)
        page.on("pageerror", lambda error: self._complaints.append(str(error)))
        page.goto(url)
        self._wait_until_ready()

    def reload(self) -> None:
        """What the browser's reload key does."""
        self.page.reload()
        self._wait_until_ready()

    def new_complaints(self) -> list[str]:
        """Errors printed since the last look, those left out that the host prints by itself."""
        lines, self._complaints = self._complaints, []
        return [line for line in lines if not HOST_NOISE.search(line)]

    def shows_error(self) -> bool:
        """Whether a dialog, a panel or a toast tells of an error now."""
        return self.page.locator(ERROR_MARKS).locator("visible=true").count() > 0

    # the graph

    def load(self, graph: dict) -> None:
        """Open a graph as dropping its file on the canvas does, and let the editor draw it."""
        self.page.evaluate("graph => window.app.loadGraphData(graph)", graph)
        self.draw()

    def open_template(self, name: str, graph: dict) -> None:
        """Open a graph as choosing it among the templates does, and wait until the view has come to rest."""
        self.page.evaluate("""([name, graph]) =>
            window.app.loadGraphData(graph, true, true, name, { openSource: "template" })""", [name, graph])
        self.draw()
        self.page.wait_for_timeout(800)

    def view(self) -> View:
        """What the window shows now."""
        return View(**self.page.evaluate(VIEW))

    def draw(self) -> None:
        """Wait until the canvas was drawn twice: sizes follow from the first."""
        self.page.evaluate("""async () => {
            window.app.canvas.setDirty(true, true);
            for (let i = 0; i < 4; i++) await new Promise(requestAnimationFrame);
        }""")

    def saved(self) -> dict:
        """The graph as the editor would save it."""
        return json.loads(self.page.evaluate("() => JSON.stringify(window.app.graph.serialize())"))

    def prompt(self) -> dict:
        """The graph as the editor would send it to the server, by node id."""
        return self.page.evaluate("async () => (await window.app.graphToPrompt()).output")

    def widgets(self) -> dict[str, dict]:
        """Values by node id and name of widget."""
        return self.page.evaluate("""() => Object.fromEntries(window.app.graph._nodes.map(
            node => [node.id, Object.fromEntries((node.widgets ?? []).map(widget => [widget.name, widget.value]))]))""")

    def missing_types(self) -> list[str]:
        """Types of nodes that nothing stands behind."""
        return self.page.evaluate("""() => window.app.graph._nodes
            .map(node => node.type).filter(type => !(type in window.LiteGraph.registered_node_types))""")

    def red_nodes(self) -> list[str]:
        """Nodes that the editor marks as wrong."""
        return self.page.evaluate("""() => window.app.graph._nodes
            .filter(node => node.has_errors).map(node => `${node.id} ${node.type}`)""")

    def values_not_offered(self) -> list[str]:
        """Values of lists to choose from that are not among the choices."""
        return self.page.evaluate("""() => window.app.graph._nodes.flatMap(node => (node.widgets ?? [])
            .filter(widget => Array.isArray(widget.options?.values) && !widget.options.values.includes(widget.value))
            .map(widget => `${node.type}.${widget.name} = ${widget.value}`))""")

    def overlapping_nodes(self) -> list[str]:
        """Pairs of nodes that lie on each other, with their titles."""
        return self.page.evaluate(OVERLAPPING_NODES)

    def links_behind_nodes(self) -> list[str]:
        """Links that pass behind a node, in the whole graph, which is small on the screen afterwards."""
        self.show_all()
        return self.page.evaluate(LINKS_BEHIND_NODES)

    def show_all(self) -> None:
        """Make the whole graph small enough for the window."""
        self.page.evaluate("""() => {
            const nodes = window.app.graph._nodes, view = window.app.canvas.ds, frame = window.app.canvas.canvas, margin = 300;
            const least = side => Math.min(...nodes.map(node => node.pos[side])) - margin;
            const most = side => Math.max(...nodes.map(node => node.pos[side] + node.size[side])) + margin;
            const across = frame.clientWidth / (most(0) - least(0)), down = frame.clientHeight / (most(1) - least(1));
            view.scale = Math.min(across, down);
            view.offset = [-least(0), -least(1)];
        }""")
        self.draw()

    def clear(self) -> None:
        self.page.evaluate("() => window.app.graph.clear()")

    def add_node(self, node_type: str) -> int:
        """Put a new node on the canvas; its id."""
        return self.page.evaluate("""type => {
            const node = window.LiteGraph.createNode(type);
            node.pos = [200, 200];
            window.app.graph.add(node);
            return node.id;
        }""", node_type)

    def connect(self, origin: int, output: str, target: int, wanted: str) -> None:
        """Wire an output to an input, both by name."""
        self.page.evaluate("""([origin, output, target, wanted]) => {
            const from = window.app.graph.getNodeById(origin), to = window.app.graph.getNodeById(target);
            from.connect(from.findOutputSlot(output), to, to.findInputSlot(wanted));
        }""", [origin, output, target, wanted])

    def node_titled(self, title: str) -> int:
        """Id of the node with this title."""
        found = self.page.evaluate("""title => window.app.graph._nodes
            .filter(node => node.title === title).map(node => node.id)""", title)
        assert len(found) == 1, f"nodes titled {title!r}: {found}"
        return found[0]

    def node_of_type(self, node_type: str) -> int:
        """Id of the first node of this type."""
        return self.page.evaluate("type => window.app.graph._nodes.find(node => node.type === type).id", node_type)

    def target_of(self, node_id: int, output: str) -> int:
        """Id of the node that the first wire of an output, by name, leads to."""
        return self.page.evaluate("""([id, output]) => {
            const node = window.app.graph.getNodeById(id);
            return node.getOutputNodes(node.findOutputSlot(output))[0].id;
        }""", [node_id, output])

    # running

    def run(self) -> None:
        """Press Run, and wait until the server's queue is empty again."""
        with self.page.expect_response(lambda answer: answer.url.endswith("/api/prompt") and answer.ok):
            self.page.get_by_role("button", name="Run", exact=True).first.click()
        self.page.wait_for_function("""async () => {
            const queue = await (await fetch("api/queue")).json();
            return queue.queue_running.length + queue.queue_pending.length === 0;
        }""", polling=200)

    def wait_for_pictures(self, titles: Sequence[str]) -> None:
        """Wait until the nodes with these titles show a picture each; the editor fetches it when it draws the node."""
        self.show_all()
        self.page.wait_for_function("""titles => titles.every(title => window.app.graph._nodes
            .some(node => node.title === title && node.imgs?.[0]?.complete && node.imgs[0].naturalWidth))""", arg=list(titles))
        self.draw()

    def picture(self, title: str, size: int = 32) -> list[float]:
        """Brightness, 0 to 255, of the picture that a node shows, on a grid of size x size."""
        return self.page.evaluate(PICTURE, [title, size])

    # the mouse

    def show_node(self, node_id: int) -> None:
        """Move the canvas until a node stands in its middle, at full size."""
        self.page.evaluate("""id => {
            window.app.canvas.ds.scale = 1;
            window.app.canvas.centerOnNode(window.app.graph.getNodeById(id));
        }""", node_id)
        self.draw()

    def place_of(self, node_id: int, right: float, down: float) -> tuple[float, float]:
        """Where on the page a point of a node is: pixels from its left edge and below its title bar."""
        x, y = self.page.evaluate("""([id, right, down]) => {
            const node = window.app.graph.getNodeById(id), frame = window.app.canvas.canvas.getBoundingClientRect();
            const [x, y] = window.app.canvas.ds.convertOffsetToCanvas([node.pos[0] + right, node.pos[1] + down]);
            return [x + frame.left, y + frame.top];
        }""", [node_id, right, down])
        return x, y

    def select(self, node_id: int) -> None:
        """Click a node's title."""

        def click() -> None:
            self.show_node(node_id)
            self.page.mouse.click(*self.place_of(node_id, 60, -15))
            self.page.mouse.move(10, 990)  # off the node: its tooltip would cover the buttons above it

        self.until(click, "id => window.app.canvas.selected_nodes[id]", node_id)

    def until(self, act: Callable[[], None], wanted: str, arg: object = None) -> None:
        """Act until ``wanted``, a JavaScript function of ``arg``, holds: a busy editor loses clicks, and a user clicks again.

        Raises:
            AssertionError: it never is.
        """
        for _ in range(TRIES):
            act()
            try:
                self.page.wait_for_function(wanted, arg=arg, timeout=TRY_MS)
                return
            except TimeoutError:
                continue
        raise AssertionError(f"{TRIES} tries did not do it: {wanted}")

    def screenshot(self, name: str, fit: bool = False) -> None:
        """Save what the window shows, if that is wanted; `fit`: the whole graph, in a window large enough to read it."""
        if self._screenshots is None:
            return
        window = self.page.viewport_size
        if fit:
            self.page.set_viewport_size(LARGE_WINDOW)
            self.page.wait_for_timeout(300)
            self.page.evaluate("() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        self.page.wait_for_timeout(800)  # the view glides
        self.page.screenshot(path=self._screenshots / f"{name}.png")
        if fit and window:
            self.page.set_viewport_size(window)

    def _wait_until_ready(self) -> None:
        self.page.wait_for_function(READY)
        self.page.wait_for_load_state("networkidle")

    def _note_message(self, message) -> None:
        if message.type == "error":
            self._complaints.append(f"{message.text} ({message.location.get('url', '')})")
