"""A warm process that runs each command in a child of its own: the interpreter, the imports already made.

One request a line on stdin, a JSON object with ``args``, ``cwd`` and ``env``; the child's output goes to the files
``out`` and ``err``. The answers, a line each on stdout, are its process id and, when it ended, its exit code. A child
ends as any Python process does.
"""

import gc
import importlib
import json
import os
import signal
import sys


def warm() -> None:
    """Import what commands import, so that a child begins where its interpreter would be seconds later."""
    from evolute.__main__ import hush

    hush()
    for module in (
        "evolute.cli",
        "evolute.recipes.llm",
        "evolute.reports.page",
        "lightning.pytorch.loggers",
        "transformers.models.llama.modeling_llama",
    ):
        importlib.import_module(module)


def main() -> None:
    warm()
    gc.freeze()  # children then share these pages
    answers = os.dup(1)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            become(request)
            from evolute.__main__ import main as command

            sys.exit(command())
        os.write(answers, f"{pid}\n".encode())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.write(answers, f"{code}\n".encode())


def become(request: dict) -> None:
    """Be the process that ``evolute ARGS`` would be."""
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, request["err"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        os.dup2(os.open(path, flags), descriptor)
    # A suite started in the background inherits ignored interrupts; a command at a terminal does not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv = ["evolute", *request["args"]]
    sys.path[0] = os.path.dirname(sys.executable)


if __name__ == "__main__":
    main()
