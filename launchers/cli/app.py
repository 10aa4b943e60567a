"""Start-up, config flags, help and error messages of all commands. A user's mistake is one message, no traceback."""

import contextlib
import errno
import io
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags

from experiments.config import catalog
from kd_core.errors import NonFiniteError, RankError, UsageError, escape_unprintable
from launchers.cli.torchrun_report import report_to_torchrun

FLAGS = flags.FLAGS
log = logging.getLogger("kd")
MOST_MESSAGE = 20_000  # characters, since a message may quote a long value
started_as = ""  # "kd" if `kd` runs the command


def define_config_flags(kind: str) -> None:
    """Defines the flags of commands that take a config of `kind`."""
    name = "experiment" if kind == "Experiment" else "export"
    flags.DEFINE_multi_string("config", [], f"The {name}, then changes to it; applied in order (see above).")
    flags.DEFINE_bool("list", False, f"List every {name} and fiddler with its first docstring line, and exit.")
    flags.DEFINE_bool("print_config", False, "Print every value and who set it, and exit.")
    flags.DEFINE_bool("diff", False, "Print only what differs from the base (the first --config), and exit.")
    flags.DEFINE_string("base", None, "For --diff: another base, NAME or run:RUN_DIR.")
    flags.DEFINE_bool("dry_run", False, "Check the parts against each other and the files, and exit.")


def resolve_flags(kind: str, more: Sequence[str] = ()) -> Any:
    """Resolves the config of the flags and of `more` items.

    Returns None after --list, --diff or --print_config has printed what was asked for.
    """
    if FLAGS.list:
        print_page(catalog.format_listing(kind) + "\n")
        return None
    from experiments.config import config_items

    if FLAGS.base and not FLAGS.diff:
        raise UsageError(f"--base={FLAGS.base}: is for --diff, which is not given. Add it, or leave --base out.")
    items = [*FLAGS.config, *more]
    resolved = config_items.resolve_items(items, kind)
    if FLAGS.diff:
        base = FLAGS.base or items[0]
        lines = config_items.differences(config_items.resolve_items([base], kind), resolved)
        print_page(_visible_lines(lines or f"nothing differs from {base}\n"))
        return None
    if FLAGS.print_config:
        print_page(_visible_lines(config_items.describe(resolved)))
        return None
    return resolved


def rewrite_commands(text: str) -> str:
    """Returns a text with its command lines rewritten to `kd …`, if the user started `kd`."""
    if not started_as:
        return text
    for before, after in ((r"\S*python[\d.]* -m launchers\.(\w+)", ""), (r"-m launchers\.(\w+)", "--no-python ")):
        text = re.sub(before, lambda match, after=after: f"{after}{started_as} {match[1].replace('_', '-')}", text)
    return text


def _help(doc: str, kind: str | None) -> str:
    parts = [doc.strip()]
    if kind is not None:
        parts.append(f"Known to --config (first docstring line, module):\n{catalog.format_listing(kind)}")
    shared = [__name__] if kind is not None else []
    described = [FLAGS.module_help(module).split(":", 1)[1].strip("\n") for module in (*shared, sys.argv[0])]
    return rewrite_commands("\n\n".join([*parts, "Flags:\n" + "\n".join(described)]))


def _visible_lines(text: str) -> str:
    """Escapes what would move the cursor, since a message may quote a file that others wrote."""
    return "\n".join(map(escape_unprintable, text.expandtabs().split("\n")))


def _short(text: str) -> str:
    return text if len(text) <= MOST_MESSAGE else text[: MOST_MESSAGE - 1] + "…"


class _TqdmHandler(logging.Handler):
    """Handler that prints log lines above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(_visible_lines(self.format(record)), file=sys.stderr)


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _message(error: BaseException) -> str | None:
    """Returns the message for the user, or None for an error of this program, which keeps its traceback."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted. Run the same command again to go on from what is done."
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"disk full: {error}. Free some space and run the same command again; what was complete is kept."
    if isinstance(error, (UsageError, NonFiniteError)):
        text, _, context = str(error).partition("\n\nFiddle context: ")
        path = re.search(r"<root>\.([^ ]+)", context)
        return f"{text} (At {path[1]} in the config.)" if path else text
    if isinstance(error, OSError):
        return f"{error.strerror or error}: {error.filename or ''}".rstrip(": ")
    return None


def _report_error(prog: str, message: str, prints: bool) -> None:
    """Prints the message on a rank that prints, and leaves it to torchrun's report on every rank."""
    line = f"{prog}: error: {_visible_lines(_short(rewrite_commands(message)))}"
    if prints:
        print(line, file=sys.stderr, flush=True)
    report_to_torchrun(line)


@contextlib.contextmanager
def guard(prog: str) -> Generator[None]:
    """Turns a user's mistake into one message of one rank, under the name `prog`, and exit status 1."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        message = _message(error)
        if message is None:
            raise
        log.debug("%s", traceback.format_exc())  # only into the attempt's log
        _report_error(prog, message, _is_first() or isinstance(error, RankError))
        raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 1) from None


def exit_with_usage_error(prog: str, message: str) -> NoReturn:
    """Exits with one message about a mistake in the command line."""
    _report_error(prog, message, _is_first())
    raise SystemExit(2)


def _escape_unencodable_output() -> None:
    """Makes output streams escape characters that the locale's encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _with_home(argument: str) -> str:
    """Returns `--flag=~/path` with the home folder, since shells expand `~` only at the beginning of a word."""
    return re.sub(r"^(--?\w+=)~(?=/|$)", lambda match: f"{match[1]}{Path.home()}", argument)


def _unknown_flag(name: str, argv: Sequence[str]) -> str:
    """Returns the message for an unknown flag: the nearest flag, or how a value of an experiment is set."""
    flags_by_module = FLAGS.flags_by_module_dict()
    modules = [sys.argv[0], *([__name__] if "list" in FLAGS else [])]
    flag_names = [flag.name for module in modules for flag in flags_by_module.get(module, ())]
    text = next((argument.lstrip("-") for argument in argv if argument.lstrip("-").startswith(f"{name}=")), "")
    setting = f"A value of the experiment is set by --config={text}." if text and "config" in FLAGS else ""
    return " ".join(
        filter(None, [f"unknown flag --{name}.", catalog.nearest(name, flag_names) or setting, "Try --help."])
    )


def print_page(text: str) -> None:
    """Prints all that a command has to say. A reader that closes the pipe early, such as `head`, ends the process."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    print(text, end="", flush=True)


def _take_items(arguments: Sequence[str]) -> None:
    """Adds arguments that are no flags to the `--config` items, the experiment first."""
    changes = [
        item for item in arguments if "=" in item.partition("(")[0] or item.startswith(("fiddler:", "tag:", "set:"))
    ]
    FLAGS.config = [*(item for item in arguments if item not in changes), *FLAGS.config, *changes]


def _parse(argv: Sequence[str], prog: str, doc: str, kind: str | None) -> list[str]:
    """Parses the flags for `app.run`. Returns the remaining arguments, the program's name first."""
    if {"--help", "-help", "-h"} & set(argv[1:]):
        print_page(_help(doc, kind) + "\n")
        raise SystemExit(0)
    try:
        return FLAGS([_with_home(argument) for argument in argv])
    except flags.UnrecognizedFlagError as error:
        exit_with_usage_error(prog, _unknown_flag(error.flagname, argv))
    except flags.Error as error:
        exit_with_usage_error(prog, f"{error}. Try --help.")


def _check_arguments(arguments: Sequence[str], names: Sequence[str], more: bool, prog: str) -> None:
    if len(arguments) > len(names) and not more:
        unexpected = arguments[len(names)]
        hint = f"Did you mean --config={unexpected}? " if "=" in unexpected and "config" in FLAGS else ""
        exit_with_usage_error(prog, f"unexpected argument {unexpected!r}. {hint}Flags begin with --; try --help.")
    if len(arguments) < len(names):
        exit_with_usage_error(prog, f"no {names[len(arguments)]} given. Try --help.")


def run_command(
    main: Callable[..., None],
    module: str,
    doc: str,
    kind: str | None = None,
    *,
    arguments: Sequence[str] = (),
    more: bool = False,
) -> None:
    """Runs `main` as the command `module`, with the values of its positional `arguments`.

    They may stand before or behind flags. With `more`, the last one may be repeated. A command that takes a config
    (`kind`) has no positional arguments: it reads them as items of `--config`.
    """
    _escape_unencodable_output()
    FLAGS.set_gnu_getopt(True)
    command = module.removeprefix("launchers.")
    prog = f"{started_as} {command.replace('_', '-')}" if started_as else command

    def run(argv: Sequence[str]) -> None:
        values = argv[1:]
        if kind is not None:
            _take_items(values)
            values = []
        _check_arguments(values, arguments, more, prog)
        log.setLevel(logging.DEBUG)
        log.propagate = False  # absl's own handler would print every line twice
        if _is_first():
            log.addHandler(_TqdmHandler(logging.INFO))
        with guard(prog):
            main(*values)

    app.run(run, argv=sys.argv, flags_parser=lambda argv: _parse(argv, prog, doc, kind))
