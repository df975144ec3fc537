"""One ComfyUI server with the pack, one headless Chromium, and an editor page in it for each test.

EMMA_TEST_HOST names the ComfyUI folder, EMMA_TEST_HOST_PYTHON a Python that runs it. The pack is linked as ComfyUI-EMMA,
so that the editor shows that name whatever the repository's folder is called. EMMA_SCREENSHOTS names a folder for
pictures of what the tests saw.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from editor import Editor
from graphs import PACK, PACK_NAME, link_packs, place_files
from playwright.sync_api import Browser, sync_playwright

from harness.browser import find_chromium
from harness.hosts import Host, read_host
from harness.server import HostServer

HOW_TO_RUN = "Browser tests are started by: python run.py test tests/browser [pytest arguments]"
# nothing outside this machine is reached, whatever the editor or the browser would like to load
CHROMIUM_ARGUMENTS = [
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]
WINDOW = {"width": 1600, "height": 950}
PATIENCE_MS = 120_000  # a busy machine opens the editor slowly

if not (os.environ.get("EMMA_TEST_HOST") and os.environ.get("EMMA_TEST_HOST_PYTHON")):
    pytest.exit(HOW_TO_RUN, returncode=pytest.ExitCode.USAGE_ERROR)


@pytest.fixture(scope="session")
def host() -> Host:
    found = read_host(Path(os.environ["EMMA_TEST_HOST"]).expanduser())
    assert found is not None, f"no ComfyUI in {os.environ['EMMA_TEST_HOST']}"
    return found


@pytest.fixture(scope="session")
def server(host, tmp_path_factory) -> Iterator[HostServer]:
    """The running server: the pack, the other packs that our graphs use and that are at hand, and a file under every
    name that a graph asks for (an empty one: the graphs that use them are opened, not run).
    """
    packs, work_dir = tmp_path_factory.mktemp("packs"), tmp_path_factory.mktemp("server")
    (packs / PACK_NAME).symlink_to(PACK, target_is_directory=True)
    others = link_packs(packs, host.path)
    place_files(work_dir)
    python = Path(os.environ["EMMA_TEST_HOST_PYTHON"])
    arguments = ["--use-pytorch-cross-attention"]
    with HostServer(host, python, work_dir, packs / PACK_NAME, arguments, further_packs=others) as running:
        yield running


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    chromium = find_chromium()
    assert chromium is not None, "no Chromium was found: set CHROMIUM_PATH"
    as_root = hasattr(os, "geteuid") and os.geteuid() == 0
    arguments = [*CHROMIUM_ARGUMENTS, *(["--no-sandbox"] if as_root else [])]
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield running
        running.close()


@pytest.fixture(scope="session")
def screenshots(host) -> Path | None:
    """The folder for pictures of this host, None if none are wanted."""
    chosen = os.environ.get("EMMA_SCREENSHOTS")
    if not chosen:
        return None
    folder = Path(chosen).expanduser().resolve() / host.version
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def new_visitor(browser, server, screenshots):
    """A context manager: the editor of a visitor who has no tabs, drafts or caches of before."""

    @contextmanager
    def visit() -> Iterator[Editor]:
        context = browser.new_context(viewport=WINDOW)
        context.set_default_timeout(PATIENCE_MS)
        yield Editor(context.new_page(), server.url, screenshots)
        context.close()

    return visit


@pytest.fixture
def open_editor(new_visitor) -> Iterator[Callable[[], Editor]]:
    """A function: one more editor, of a new visitor."""
    with ExitStack() as visits:
        yield lambda: visits.enter_context(new_visitor())


@pytest.fixture(scope="module")
def editor(new_visitor) -> Iterator[Editor]:
    """One editor for the tests of a module, which leave nothing behind but open tabs."""
    with new_visitor() as opened:
        yield opened
