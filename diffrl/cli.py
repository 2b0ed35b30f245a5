"""The command line, `diffrl VERB ...`. Each verb's code is imported when it is called."""

import contextlib
import inspect
import io
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, cast

from diffrl.support.errors import UserError, closest, joined, printable, shortened
from diffrl.support.stopping import Interrupted, Stopped, stop_signals

HELP_WORDS = ("-h", "--help")
HELP = """diffrl: offline reinforcement learning on one diffusion core

  diffrl train CONFIG [--steps N --seeds 0 1 2 ...]   train an agent
  diffrl resume RUN [--steps N]                       go on with a run of any kind that was cut, or make it longer
  diffrl sweep CONFIG --set agent.q_weight=0.5,1,2 --seeds 0 1 2 --jobs 2 --out sweeps/NAME   many runs, or a search
  diffrl online RUN | CONFIG [--steps N ...]          learn in the environment, from an offline run or from its start
  diffrl evaluate RUN [--episodes 100]                score its last and best checkpoint
  diffrl render RUN --out video.mp4                   a video of its policies, or a .gif
  diffrl export RUN --to FOLDER [--onnx]              its policy as a folder for others, ready for the Hub
  diffrl diagnose RUN                                 is its diffusion policy well trained, sampled, tuned?
  diffrl augment synther DATASET --out NEW.hdf5       synthetic transitions by a diffusion model of the data's
  diffrl augment flow-to-better DATASET --preferences 500 --out NEW.hdf5   better trajectories, from preferences
  diffrl augment label DATASET --out PREFERENCES.json  compare its segments on a page, for a reward from preferences
  diffrl augment fidelity REAL SYNTHETIC              how faithful the rows of one data set are to another's
  diffrl finetune [--algo ddpo-is --reward jpeg ...]  an image model, on a reward or preferences
  diffrl finetune policy RUN [--algo dppo ...]        a run's policy, in its environment or on preferences
  diffrl distil RUN --to consistency | reflow         a policy of one network call, or a few, from a run's
  diffrl compare RUN RUN [...]                        policies from the same starts, or image models, on one page
  diffrl report RUN [RUN ...] [--csv FILE]            many runs as a paper's tables and figures, and one page
  diffrl select RUN [RUN ...] [--csv FILE]            which of many policies: by a bandit online, by the data offline
  diffrl data list | info | generate | download | convert   data sets
  diffrl doctor                                       what works on this machine, and what to install
  diffrl completion bash | zsh | fish                 TAB completes verbs, options and their values in your shell
  diffrl VERB --help, diffrl help VERB                all options, explained

First steps:
  diffrl data info maze2d-umaze-v1                    what is in a data set
  diffrl train diffusion_ql/maze2d-umaze-v1-small     train for minutes; then read the printed score
  tensorboard --logdir runs                           watch it

From Python:
  from diffrl import load_policy
  policy = load_policy("runs/NAME")
  action = policy(observation)

D4RL data sets are kept in $DIFFRL_DATA, else in your user data folder; Minari's in Minari's own."""


def _train(words: Sequence[str]) -> int:
    from diffrl.commands import train

    return train.run(words)


def _resume(words: Sequence[str]) -> int:
    from diffrl.commands import resume

    return resume.run(words)


def _sweep(words: Sequence[str]) -> int:
    from diffrl.commands import sweep

    return sweep.run(words)


def _online(words: Sequence[str]) -> int:
    from diffrl.commands import online

    return online.run(words)


def _evaluate(words: Sequence[str]) -> int:
    from diffrl.commands.evaluate import Evaluate
    from diffrl.commands.words import parse

    return parse(Evaluate, words, "diffrl evaluate").run()


def _render(words: Sequence[str]) -> int:
    from diffrl.commands.render import Render
    from diffrl.commands.words import parse

    return parse(Render, words, "diffrl render").run()


def _export(words: Sequence[str]) -> int:
    from diffrl.commands.export import Export
    from diffrl.commands.words import parse

    return parse(Export, words, "diffrl export").run()


def _diagnose(words: Sequence[str]) -> int:
    from diffrl.commands.diagnose import Diagnose
    from diffrl.commands.words import parse

    return parse(Diagnose, words, "diffrl diagnose").run()


def _data(words: Sequence[str]) -> int:
    from diffrl.commands import data

    return _subcommand("data", "Data sets.", data.VERBS, words)


def _augment(words: Sequence[str]) -> int:
    from diffrl.augment import methods
    from diffrl.commands import augment
    from diffrl.support import plugins

    about, verbs = "Enlarge a data set by synthetic experience.", dict(augment.VERBS)
    if not words or words[0] in HELP_WORDS:
        if listed := plugins.listed(methods.GROUP, verbs):
            about += f" Of other packages: {', '.join(listed)}."
    elif words[0] in verbs:
        for line in plugins.left_out(methods.GROUP, {words[0]}):
            print(f"diffrl: {line}", file=sys.stderr)
    elif (brought := methods.find(words[0], verbs)) is not None:
        verbs[words[0]] = augment.of_package(words[0], brought)
    elsewhere = plugins.not_here(methods.GROUP) if words and not words[0].startswith("-") else ""
    return _subcommand("augment", about, verbs, words, lambda: methods.names(verbs), elsewhere)


def _finetune(words: Sequence[str]) -> int:
    from diffrl.commands import finetune

    return finetune.run(words)


def _distil(words: Sequence[str]) -> int:
    from diffrl.commands import distil

    return distil.run(words)


def _compare(words: Sequence[str]) -> int:
    from diffrl.commands.compare import Compare
    from diffrl.commands.words import parse

    return parse(Compare, words, "diffrl compare").run()


def _report(words: Sequence[str]) -> int:
    from diffrl.commands.report import Report
    from diffrl.commands.words import parse

    return parse(Report, words, "diffrl report").run()


def _select(words: Sequence[str]) -> int:
    from diffrl.commands.select import Select
    from diffrl.commands.words import parse

    return parse(Select, words, "diffrl select").run()


def _doctor(words: Sequence[str]) -> int:
    from diffrl.commands.doctor import Doctor
    from diffrl.commands.words import parse

    return parse(Doctor, words, "diffrl doctor").run()


def _completion(words: Sequence[str]) -> int:
    from diffrl.commands.completion import Completion
    from diffrl.commands.words import parse

    return parse(Completion, words, "diffrl completion").run()


def _subcommand(
    name: str,
    description: str,
    verbs: Mapping[str, type],
    words: Sequence[str],
    others: Callable[[], Sequence[str]] = lambda: (),
    elsewhere: str = "",
) -> int:
    """Run `diffrl NAME VERB ...`, whose verbs are dataclasses with a `run()`.

    others: gives further verbs. elsewhere: where a verb may be that is not here, as `plugins.not_here` says it.
    """
    import tyro

    from diffrl.commands.words import flag_values, parse, switches

    if not words or words[0] in HELP_WORDS:
        app = tyro.extras.SubcommandApp()
        for verb, schema in verbs.items():
            first, *_ = inspect.cleandoc(schema.__doc__ or verb).split("\n\n")  # the rest is the verb's own help
            app.command(name=verb)(type(schema.__name__, (schema,), {"__doc__": first}))
        app.cli(args=["--help"], prog=f"diffrl {name}", description=description)
    if words[0] not in verbs:
        raise _no_command(words, {verb: f"{name} {verb}" for verb in [*verbs, *others()]}, name, elsewhere)
    # Its verb alone: in what several verbs have, tyro names those that are not meant, and not as they are called.
    schema = verbs[words[0]]
    asked: Any = parse(schema, flag_values(words[1:], switches(schema)), f"diffrl {name} {words[0]}")
    return int(asked.run() or 0)


def _no_command(words: Sequence[str], known: Mapping[str, str], parent: str = "", elsewhere: str = "") -> UserError:
    """The error for words of which the first is no command, with the whole command that was meant, where one is near.

    known: the command of each word that stands in its place; parent: the command that the words follow, if any.
    elsewhere: what is added where none is near.
    """
    said = " ".join(["diffrl", *([parent] if parent else [])])
    near = None if words[0].startswith("-") else closest(words[0], known, cutoff=0.65)
    if near is not None:
        meant = f"did you mean `diffrl {shlex.join([*known[near].split(), *words[1:]])}`?"
    elif parent:
        meant = f"there are {joined([f'`diffrl {command}`' for command in known.values()])}.{elsewhere}"
    else:
        meant = "`diffrl --help` lists what there is."
    return UserError(f"There is no `{said} {shortened(words[0])}`: {meant}")


def _commands() -> dict[str, str]:
    """Every command by its last word, such as "flow-to-better": "augment flow-to-better"; the verbs first of all.

    And what a search and the version are, for which there is no verb.
    """
    from diffrl.commands import augment, data

    below = {"data": data.VERBS, "augment": augment.VERBS, "finetune": ("policy",)}
    nested = {word: f"{verb} {word}" for verb, words in below.items() for word in words}
    nested |= {"search": "sweep --search optuna", "version": "--version"}
    return nested | {verb: verb for verb in VERBS}


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": _train,
    "resume": _resume,
    "sweep": _sweep,
    "online": _online,
    "evaluate": _evaluate,
    "render": _render,
    "export": _export,
    "diagnose": _diagnose,
    "augment": _augment,
    "finetune": _finetune,
    "distil": _distil,
    "compare": _compare,
    "report": _report,
    "select": _select,
    "data": _data,
    "doctor": _doctor,
    "completion": _completion,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; give its exit code. A user's mistake prints a few lines and gives 2.

    Where the reader of our output has gone, as after `| head -1`, the command ends without a word and gives 1.
    SIGINT and SIGTERM end it within seconds, saved, by 130; a second one at once.
    """
    for stream in (sys.stdout, sys.stderr):
        strict = isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape")
        if strict and not str(stream.encoding).lower().startswith("utf"):  # in ASCII there is no plus-minus
            cast("io.TextIOWrapper", stream).reconfigure(errors="replace")
    try:
        try:
            code = None
            with contextlib.suppress(Stopped), stop_signals(at_once=True, deadly=True):
                code = _command(list(sys.argv[1:] if arguments is None else arguments))
            return Interrupted.exit_code if code is None else code  # a stop as it ends has nothing to stop
        finally:
            sys.stdout.flush()  # so that what is still buffered fails here, not while Python shuts down
    except BrokenPipeError:
        _drop_output()
        return 1
    except OSError as error:  # our output, onto a disk that is full
        _drop_output()
        print(f"diffrl: What is printed cannot be written: {error.strerror or error}.", file=sys.stderr)
        return 2


def _drop_output() -> None:
    """Let nothing more be printed: what is buffered would fail again while Python shuts down."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _set_up() -> Iterator[None]:
    """A block that needs an installed diffrl. Raises UserError where a checkout is run by a Python that has none."""
    try:
        yield
    except ModuleNotFoundError as error:  # that of a distribution is one, too
        raise UserError(
            f"{error.name} is not installed for {sys.executable}: diffrl is not set up for this Python. "
            "`pip install -c constraints.txt .` in its folder sets it up; `make setup` makes a .venv with it."
        ) from error


def _command(words: Sequence[str]) -> int:
    try:
        if not words:
            with _set_up():
                from diffrl.commands.greeting import greeting

            print(greeting())
            return 0
        if words[0] == "help" and len(words) > 1:
            words = [*words[1:], "--help"]
        if words[0] in ("-h", "--help", "help"):
            print(HELP)
            return 0
        if words[0] in ("-V", "--version"):
            from importlib.metadata import version

            with _set_up():
                print(f"diffrl {version('diffrl')}")
            return 0
        if words[0] not in VERBS:
            raise _no_command(words, _commands())
        with _set_up():
            from diffrl.commands.optional import registry

        with registry:
            return VERBS[words[0]](_help_first(words[0], words[1:]))
    except UserError as error:
        print(f"diffrl: {printable(str(error))}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # see `main`
        raise
    except OSError as error:  # a disk that is full, a folder that may not be written
        from diffrl.support.failure import unwritten

        if error.filename is None and not _prints():  # see `main`
            raise
        print(f"diffrl: {printable(shortened(unwritten(error)))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        again = f"Stopped. Begin again with `{shlex.join(['diffrl', *words])}`."
        said = str(stopped) if isinstance(stopped, Interrupted) else again
        if said and not _is_silent():
            print(f"diffrl: {said}", file=sys.stderr)
        return Interrupted.exit_code


def _prints() -> bool:
    """Whether what is printed can be written where it goes: an empty line."""
    try:
        print(flush=True)
    except OSError:
        return False
    return True


def _is_silent() -> bool:
    """Whether this process is one of several of a run, of which another speaks."""
    from diffrl.images.launch import is_silent

    return is_silent()


def _help_first(verb: str, words: Sequence[str]) -> Sequence[str]:
    """The words of a verb with --help before its operands, so that its usage shows them: tyro's has those to come."""
    asking = [word for word in words if word in HELP_WORDS]
    if not asking or verb == "train":  # whose operand is taken from the words before tyro sees them
        return words
    rest = [word for word in words if word not in asking]
    nested = verb in ("data", "augment") or rest[:1] == ["policy"]
    return [*rest[:nested], *asking[:1], *rest[nested:]]


def script() -> NoReturn:
    """Run one command as a process of its own: `diffrl` on the command line."""
    code = main()
    if code == Interrupted.exit_code:
        # All is saved and said; what libraries do at a process's end, such as waiting for compilers, takes seconds.
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    script()
