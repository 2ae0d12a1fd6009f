"""The names of the commands, and help texts. Standard library only."""

from qsr.output import in_words_of_caller

COMMANDS = {
    "train": "train or resume a run, or several one after another",
    "plan": "predict the rounds, time and cost of a run before it starts",
    "submit": "submit runs to a Slurm cluster",
    "status": "show the status of runs, or watch them",
    "report": "compare runs: means, intervals, paired differences",
    "doctor": "check whether a run would start here",
    "prepare": "create and check data sets",
    "evaluate": "validate a trained model, or published weights",
}
"""Every command `qsr NAME`, which is the module qsr.cli.NAME, and what it does."""


OPTIONS = {
    "--cfg job": "print all settings of the run, or of each run of a sweep; start nothing",
    "--package NAME": "with --cfg job: only the settings below NAME, for example sync",
    "--config-dir DIR": "also take experiments and files of groups from DIR, laid out as configs/",
    "-m, --multirun": "allowed, and not needed: a list, as in seed=1,2,3, makes a run per value",
    "-h, --help": "this text",
}
"""The options of every command that takes settings."""

OWN_OPTIONS = {
    "plan": {
        "--json": "print one JSON object instead",
        "--figure FILE": "draw FILE.png and FILE.svg",
    },
    "submit": {"--dry-run": "print the plan and the batch file, submit nothing"},
}
"""Those of one command alone."""


def show_help(text: str | None) -> int:
    """Print the help of a command, its module's docstring; returns the exit status 0."""
    print(in_words_of_caller(text or ""))
    return 0
