"""Set-up and the two commands, `python run.py demo` and `python run.py test`, with nothing but Python 3.10 or newer."""

import sys

if sys.version_info < (3, 10):  # noqa: UP036  (an older Python must get this far, to be told)
    sys.exit(
        "ComfyUI-EMMA needs Python 3.10 or newer; this is Python %d.%d.\n"  # noqa: UP031
        "Install one from python.org or your system's packages, then run it by name, for instance: python3.11 %s"
        % (sys.version_info[0], sys.version_info[1], " ".join(sys.argv))
    )

from harness.commands import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
