"""Set-up and test running behind `python run.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.browser import find_chromium
from harness.commands import main
from harness.environment import InstallStep, SetupError, ensure_environment, explain_failure, python_of
from harness.hosts import find_hosts, read_host, without_torch
from harness.suites import Suite, SuiteResult, complaints, read_report, run_suites, split_arguments, total_line

ROOT = Path(__file__).resolve().parents[2]
REPORT = '<testsuites><testsuite tests="7" failures="1" errors="1" skipped="2"/></testsuites>'


def make_host(folder: Path, version: str = "0.3.64") -> Path:
    folder.mkdir(parents=True)
    (folder / "main.py").touch()
    (folder / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    return tmp_path / "home"


def test_hosts_are_found_in_order_and_once(home, tmp_path, monkeypatch):
    near = make_host(tmp_path / "installed")
    at_home = make_host(home / "ComfyUI", "0.33.0")
    chosen = make_host(tmp_path / "chosen")
    (home / "ComfyUI-notes").mkdir()
    monkeypatch.setenv("COMFYUI_PATH", f"{chosen}{';' if sys.platform == 'win32' else ':'}{at_home}")
    found = find_hosts(root=near / "custom_nodes" / "ComfyUI-EMMA")
    assert [host.path for host in found] == [chosen.resolve(), at_home.resolve(), near.resolve()]
    assert found[1].version == "0.33.0"
    assert [host.path for host in find_hosts([str(near)])] == [near.resolve()]


def test_a_named_folder_without_comfyui_is_refused(home, tmp_path):
    with pytest.raises(SetupError, match="holds ComfyUI's main.py"):
        find_hosts([str(tmp_path)])
    assert read_host(tmp_path) is None
    assert find_hosts(root=tmp_path) == []


def test_torch_lines_of_a_host_are_left_out():
    text = "torch\ntorchsde\ntorchvision>=0.2\n torchaudio\nnumpy>=1.25\n#torch"
    assert without_torch(text) == ["torchsde", "numpy>=1.25", "#torch"]


def test_arguments_are_sorted_into_suites():
    folders = [str(ROOT / "tests" / suite) for suite in ("lab", "fuzz", "host", "browser")]
    named = [str(ROOT / "tests/core/test_run.py") + "::test_x", *folders]
    choice = split_arguments([*named, "-k", "seam"])
    assert choice.core_paths == (f"{ROOT / 'tests/core/test_run.py'}::test_x",)
    assert [choice.lab_paths, choice.fuzz_paths, choice.host_paths, choice.browser_paths] == [(folder,) for folder in folders]
    assert choice.options == ("-k", "seam")


def test_chromium_is_the_chosen_one_or_the_first_on_the_path(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CHROMIUM_PATH", raising=False)
    assert find_chromium() is None
    for name in ("google-chrome", "chromium"):
        (tmp_path / name).touch(mode=0o755)
    assert find_chromium() == tmp_path / "chromium"
    monkeypatch.setenv("CHROMIUM_PATH", str(tmp_path / "google-chrome"))
    assert find_chromium() == tmp_path / "google-chrome"
    monkeypatch.setenv("CHROMIUM_PATH", str(tmp_path / "gone"))
    with pytest.raises(SetupError, match="which is no file"):
        find_chromium()


def test_report_counts_errors_as_failures(tmp_path):
    (tmp_path / "report.xml").write_text(REPORT)
    result = read_report("core", tmp_path / "report.xml", 1, 2.0)
    assert (result.passed, result.failed, result.skipped) == (3, 2, 2)
    assert total_line([result, result]) == "6 passed, 4 failed, 4 skipped"


def test_a_process_without_report_is_a_failure(tmp_path):
    assert read_report("core", tmp_path / "none.xml", 0, 1.0).failed == 1


@pytest.mark.parametrize(("result", "fails"), [
    (SuiteResult("core", 5, 0, 1, 0), False),
    (SuiteResult("core", 5, 1, 0, 1), True),
    (SuiteResult("ComfyUI", 0, 0, 9, 0), True),   # a host was found, and all of its tests were skipped
    (SuiteResult("ComfyUI", 0, 0, 0, 5), True),   # a host was found, and nothing was collected
    (SuiteResult("browser", 0, 0, 9, 0), True),   # a Chromium was found, and all of its tests were skipped
])
def test_what_makes_a_run_fail(result, fails):
    assert bool(complaints([result], chosen=False)) == fails


@pytest.fixture
def started(tmp_path, monkeypatch):
    """The pytest processes that a run would start, as (label, its arguments)."""
    host, suites = read_host(make_host(tmp_path / "host")), []

    def run_pytest(suite, named_lines):
        suites.append((suite.label.partition(" (")[0], [*suite.arguments]))
        return SuiteResult(suite.label, 1, 0, 0, 0)

    monkeypatch.setattr("harness.suites.find_hosts", lambda named: [host])
    monkeypatch.setattr("harness.suites.find_chromium", lambda: tmp_path / "chromium")
    monkeypatch.setattr("harness.suites.ensure_browser_environment", lambda: Path(sys.executable))
    monkeypatch.setattr("harness.suites.ensure_base_environment", lambda: Path(sys.executable))
    monkeypatch.setattr("harness.suites.host_python", lambda host, needs: Path(sys.executable))
    monkeypatch.setattr("harness.suites.run_pytest", run_pytest)
    return suites


@pytest.mark.parametrize("chosen", [[], ["-m", "gpu"]])
def test_slow_tests_run_last_and_only_when_asked_for(started, chosen, capsys):
    assert main(["test", "--jobs", "1", *chosen]) == 0
    assert [label for label, _ in started] == ["ComfyUI 0.3.64", "core", "browser: ComfyUI 0.3.64", "lab", "fuzz"]
    started.clear()
    assert main(["test", "--jobs", "1", "--slow", *chosen]) == 0
    assert [label for label, _ in started] == ["ComfyUI 0.3.64", "core", "browser: ComfyUI 0.3.64", "lab", "fuzz", "core, slow"]
    assert [arguments for _, arguments in started] == [
        *([str(ROOT / "tests" / folder), *chosen] for folder in ("host", "core", "browser", "lab", "fuzz")),
        [str(ROOT / "tests" / "core"), *chosen, "-m", "slow"],
    ]
    assert capsys.readouterr().out.strip().endswith("6 passed, 0 failed, 0 skipped")


@pytest.mark.parametrize("suite", ["core", "lab", "fuzz", "host", "browser"])
def test_named_tests_run_in_their_suite_alone(started, suite):
    chosen = str(ROOT / "tests" / suite)
    assert main(["test", chosen]) == 0
    assert [arguments for _, arguments in started] == [[chosen]]


def test_without_a_chromium_the_rest_runs_and_the_end_says_what_to_install(started, monkeypatch, capsys):
    monkeypatch.setattr("harness.suites.find_chromium", lambda: None)
    assert main(["test"]) == 0
    assert {label for label, _ in started} == {"core", "lab", "fuzz", "ComfyUI 0.3.64"}
    assert "BROWSER TESTS SKIPPED: NO CHROMIUM FOUND (install one" in capsys.readouterr().out


def test_without_a_comfyui_the_end_names_both_suites(started, monkeypatch, capsys):
    monkeypatch.setattr("harness.suites.find_hosts", lambda named: [])
    assert main(["test"]) == 0
    printed = capsys.readouterr().out
    assert {label for label, _ in started} == {"core", "lab", "fuzz"}
    assert "HOST TESTS SKIPPED: NO COMFYUI FOUND" in printed and "BROWSER TESTS SKIPPED: NO COMFYUI FOUND" in printed


def test_suites_that_run_at_the_same_time_name_their_lines_and_report_each_for_itself(tmp_path, capfd):
    suites = []
    for name, claim in (("good", "assert True"), ("bad", "assert False")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test_it.py").write_text(f"def test_it():\n    {claim}\n")
        arguments = ("-c", str(ROOT / "pyproject.toml"), str(tmp_path / name))
        suites.append(Suite(f"{name} (somewhere)", Path(sys.executable), arguments, tmp_path, dict(os.environ)))
    good, bad = run_suites(suites, jobs=2)
    assert (good.passed, good.exit_status, bad.failed, bad.exit_status) == (1, 0, 1, 1)
    lines = capfd.readouterr().out.splitlines()
    assert any(line.startswith("good | ") and "1 passed" in line for line in lines)
    assert any(line.startswith("bad | ") and "1 failed" in line for line in lines)


def test_slow_tests_of_a_chosen_file_alone(started):
    chosen = str(ROOT / "tests" / "core" / "test_run.py")
    main(["test", "--slow", chosen])
    assert [arguments for _, arguments in started] == [[chosen], [chosen, "-m", "slow"]]


@pytest.mark.parametrize(("options", "ran"), [([], "test_quick"), (["-m", "not slow", "-m", "slow"], "test_slow")])
def test_the_mark_leaves_slow_tests_out_until_asked_for(tmp_path, options, ran):
    (tmp_path / "test_two.py").write_text(
        "import pytest\n\ndef test_quick():\n    pass\n\n@pytest.mark.slow\ndef test_slow():\n    pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-v", "-c", str(ROOT / "pyproject.toml"), str(tmp_path / "test_two.py")]
    finished = subprocess.run([*command, *options], capture_output=True, text=True)
    assert f"{ran} PASSED" in finished.stdout and "1 passed, 1 deselected" in finished.stdout


def test_choosing_slow_tests_alone_says_how_to_run_them():
    assert "need --slow" in complaints([SuiteResult("core", 0, 0, 0, 5)], chosen=True)[0]


def test_needs_are_the_same_in_a_moved_checkout_and_other_with_other_contents(tmp_path):
    for folder, text in (("here", "numpy"), ("there", "numpy"), ("changed", "numpy<3")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "needs.txt").write_text(text)
    here, there, changed = (InstallStep("packages", ("-r", str(tmp_path / folder / "needs.txt"))).fingerprint()
                            for folder in ("here", "there", "changed"))
    assert here == there != changed


def test_an_environment_is_made_once_and_again_when_its_needs_change(tmp_path, monkeypatch):
    made, installed = [], []
    monkeypatch.setattr("harness.environment.pip_install", lambda python, arguments: installed.append(tuple(arguments)))
    venv, needs = tmp_path / "venv", tmp_path / "needs.txt"
    needs.write_text("a")

    def create():
        made.append(1)
        python_of(venv).parent.mkdir(parents=True)
        python_of(venv).touch()
        (venv / "pyvenv.cfg").write_text("version = 3.11.7\n")

    steps = [InstallStep("needs", ("-r", str(needs)))]
    for _ in range(2):
        assert ensure_environment(venv, steps, create) == python_of(venv)
    assert len(made) == len(installed) == 1
    needs.write_text("b")
    ensure_environment(venv, steps, create)
    assert len(made) == 1 and len(installed) == 2


@pytest.mark.parametrize(("output", "advice"), [
    ("OSError: [Errno 28] No space left on device", "Make room"),
    ("NewConnectionError: failed", "check the network"),
    ("No matching distribution found for torch==9", "EMMA_TORCH"),
    ("Permission denied: x", "a folder you own"),
])
def test_failures_of_the_set_up_say_what_to_do(output, advice):
    assert advice in (explain_failure(output, ROOT) or "")


def test_help_needs_nothing_but_python():
    finished = subprocess.run([sys.executable, "-S", str(ROOT / "run.py"), "--help"], capture_output=True, text=True)
    assert finished.returncode == 0 and "demo" in finished.stdout and "test" in finished.stdout
