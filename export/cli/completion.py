"""Shell completion of the command `varitok`; the subcommand `completion`."""

import argparse
import contextlib
import importlib
import io
import re
from collections.abc import Sequence
from importlib.resources import files

from varitok import UserError

__all__ = ["main"]

# Enables bash's completion commands in zsh.
ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"
SCRIPT = """\
_varitok() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" choices
  if [ "$COMP_CWORD" -eq 1 ]; then
    choices="{names}"
  else
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
  fi
  COMPREPLY=($(compgen -W "$choices" -- "$word"))
  [ "${{#COMPREPLY[@]}}" -gt 0 ] || COMPREPLY=($(compgen -f -- "$word"))
}}
COMP_WORDBREAKS="${{COMP_WORDBREAKS//=/}}"
complete -o default -F _varitok varitok
"""
FISH = """\
complete -c varitok -n __fish_use_subcommand -f -a "{names}"
{cases}
"""
BASH_CASE = '      {name}) choices="{choices}" ;;'
FISH_CASE = 'complete -c varitok -n "__fish_seen_subcommand_from {name}" -a "{choices}"'
SHELLS = {"bash": ("", SCRIPT, BASH_CASE), "zsh": (ZSH, SCRIPT, BASH_CASE), "fish": ("", FISH, FISH_CASE)}
"""For each shell: a prefix, the script, and the script's line for a subcommand."""


def main(words: Sequence[str]) -> None:
    """Run `varitok completion`: print the completion script of a shell."""
    parser = argparse.ArgumentParser(
        "varitok completion",
        description="Print a shell's completion script for varitok.",
        epilog="for example: varitok completion bash >> ~/.bashrc",
    )
    parser.add_argument("shell", metavar="bash|zsh|fish")
    shell = parser.parse_args(words).shell
    if shell not in SHELLS:
        raise UserError(f"{shell}: no completion for this shell; choose one of {', '.join(SHELLS)}")
    from .main import SUBCOMMANDS  # noqa: PLC0415 (a circular import)

    choices = {name: _experiments() if name == "train" else _options(one.call) for name, one in SUBCOMMANDS.items()}
    head, script, case = SHELLS[shell]
    cases = "\n".join(case.format(name=name, choices=" ".join(words)) for name, words in choices.items())
    print(head + script.format(names=" ".join(SUBCOMMANDS), cases=cases), end="")


def _options(call: str) -> list[str]:
    """List a subcommand's options by parsing its help; none if its packages are missing."""
    module, _, function = call.partition(":")
    if f"varitok.{module}" == __name__:
        return [*SHELLS]
    text = io.StringIO()
    with contextlib.suppress(ModuleNotFoundError, SystemExit), contextlib.redirect_stdout(text):
        getattr(importlib.import_module(f"varitok.{module}"), function)(["--help"])
    return sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text.getvalue())))


def _experiments() -> list[str]:
    """List the overrides `experiment=...` of all experiments."""
    folder = files("varitok.configs") / "experiment"
    parts = [(part.name, one.name) for part in folder.iterdir() if part.name != "base" for one in part.iterdir()]
    return sorted(f"experiment={part}/{name.removesuffix('.yaml')}" for part, name in parts)
