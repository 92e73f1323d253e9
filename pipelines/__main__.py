"""two-stage COMMAND, or python -m pipelines COMMAND: the same as python -m pipelines.COMMAND."""

import runpy
import sys

from pipelines.console import UserError, first_process, nearest, run_command

COMMANDS = {
    "train_all": "train both stages, sample, compare",
    "generate": "draw images from a trained run, or complete a picture",
    "compare": "compare all priors of one run, or several runs on one page",
    "likelihood": "bounds on log p(x) of held-out images",
    "explore": "sample and inspect trained runs in the browser",
    "export": "a trained model as a folder to share",
    "publish": "a trained model on the Hugging Face hub",
    "score": "how unusual images are under a model",
    "study": "common questions about VAEs, answered by experiments",
    "benchmark": "measure speed",
    "reproduce": "train the presets of the tables in README and docs, and write these tables",
}


def help_text() -> str:
    lines = "\n".join(f"  {name:11} {says}" for name, says in COMMANDS.items())
    return f"usage: two-stage COMMAND …\n\n{lines}\n\ntwo-stage COMMAND --help says more."


def choose() -> None:
    """Raises UserError for an unknown command."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        if first_process():
            print(help_text())
        return
    if (module := name.replace("-", "_")) not in COMMANDS:
        raise UserError(f"there is no command {name!r}{nearest(name, COMMANDS)}")
    sys.argv = [name, *arguments]
    runpy.run_module(f"pipelines.{module}", run_name="__main__", alter_sys=True)


def main() -> None:
    run_command(choose)


if __name__ == "__main__":
    main()
