"""How many damaged files are read, and from which seed."""


def pytest_addoption(parser):
    parser.addoption("--inputs", type=int, default=300, help="damaged files in all, over every reader (default: %(default)s)")
    parser.addoption("--fuzz-seed", type=int, default=0, help="of everything random (default: %(default)s)")
