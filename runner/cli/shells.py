"""Completion scripts for bash, zsh and fish. They hold all options; what changes is asked of `completion --words`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Final

from runner.cli.grammar import Command, Option, Value

_BASH: Final = """\
# Completion of mlx-run for bash, 3.2 or newer; `mlx-run completion --help` says where it goes.
_mlx_run() {{
    local cur prev command i
    cur="${{COMP_WORDS[COMP_CWORD]}}"
    prev="${{COMP_WORDS[COMP_CWORD-1]}}"
    if [[ $cur == "=" ]]; then cur=""
    elif [[ $prev == "=" ]]; then prev="${{COMP_WORDS[COMP_CWORD-2]}}"
    fi
    COMPREPLY=()
    command=""
    for ((i = 1; i < COMP_CWORD; i++)); do
        case "${{COMP_WORDS[i]}}" in
            -f|--file) ((i++)) ;;
            -*) ;;
            *) command="${{COMP_WORDS[i]}}"; break ;;
        esac
    done
    case "$command" in
        "")
            case "$prev" in -f|--file) return ;; esac
            COMPREPLY=($(compgen -W "{commands} -f --file --help --version" -- "$cur")) ;;
{cases}
    esac
}}
complete -o default -F _mlx_run mlx-run
"""

_ZSH: Final = """\
#compdef mlx-run
# Completion of mlx-run for zsh; `mlx-run completion --help` says where it goes.
_mlx_run_words() {{
    local -a found
    found=(${{(f)"$(mlx-run completion --words $1 2>/dev/null)"}})
    compadd -a found
}}
_mlx_run() {{
    local curcontext="$curcontext" state line
    local -a commands
    commands=(
{commands}
    )
    _arguments -C '*'{{-f,--file}}'[a manifest, or an overlay over those before it]:file:_files' \\
        '(- *)--version[print the version and exit]' '1: :->command' '*:: :->arguments'
    case $state in
        command) _describe -t commands command commands ;;
        arguments)
            case $words[1] in
{cases}
            esac ;;
    esac
}}
compdef _mlx_run mlx-run
if [[ $funcstack[1] == _mlx_run ]]; then _mlx_run "$@"; fi
"""

_FISH: Final = """\
# Completion of mlx-run for fish; `mlx-run completion --help` says where it goes.
complete -c mlx-run -n __fish_use_subcommand -f
complete -c mlx-run -n __fish_use_subcommand -s f -l file -r -F -d 'a manifest, or an overlay over those before it'
complete -c mlx-run -n __fish_use_subcommand -l version -d 'print the version and exit'
{lines}
"""


def bash(commands: Sequence[Command]) -> str:
    """A script for bash. Where nothing fits, it leaves the word to bash's own completion of files."""
    cases = "\n".join(line for command in commands for line in _bash_case(command))
    return _BASH.format(commands=" ".join(command.name for command in commands), cases=cases)


def _bash_case(command: Command) -> list[str]:
    flags = " ".join(flag for option in command.options for flag in option.flags)
    operand = _bash_value(command.operand) if command.operand is not None else ""
    return [
        f"        {command.name})",
        '            case "$prev" in',
        *(
            f"                {'|'.join(option.flags)}) {_bash_value(option.value)}return ;;"
            for option in command.options
            if option.value is not None
        ),
        "            esac",
        f'            if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W "{flags}" -- "$cur"))',
        *([f"            else {operand.removesuffix('; ')}"] if operand else []),
        "            fi ;;",
    ]


def _bash_value(value: Value) -> str:
    """A statement that offers values, or nothing for files and what nobody knows."""
    if value.kind == "words":
        return f'COMPREPLY=($(compgen -W "{" ".join(value.words)}" -- "$cur")); '
    if value.kind in ("file", "any"):
        return ""
    return f'COMPREPLY=($(compgen -W "$(mlx-run completion --words {value.kind} 2>/dev/null)" -- "$cur")); '


def zsh(commands: Sequence[Command]) -> str:
    """A script for zsh, to be sourced, or put into a folder of $fpath as _mlx-run."""
    listed = [f"        {shlex.quote(f'{command.name}:{command.help}')}" for command in commands]
    cases = "\n".join(line for command in commands for line in _zsh_case(command))
    return _ZSH.format(commands="\n".join(listed), cases=cases)


def _zsh_case(command: Command) -> list[str]:
    specs = [spec for option in command.options for spec in _zsh_option(option)]
    if command.operand is not None:
        number = "*" if command.many else "1"
        specs.append(shlex.quote(f"{number}:{_zsh_value(command.operand)}"))
    return [f"                {command.name}) _arguments -s {' '.join(specs)} ;;"]


def _zsh_option(option: Option) -> list[str]:
    """A spec for each spelling, which exclude each other where the option comes once."""
    before = "*" if option.many else f"({' '.join(option.flags)})"
    after = f":{_zsh_value(option.value)}" if option.value is not None else ""
    return [shlex.quote(f"{before}{flag}[{_zsh_text(option.help)}]{after}") for flag in option.flags]


def _zsh_value(value: Value) -> str:
    label = _zsh_text(value.label)
    match value.kind:
        case "words":
            return f"{label}:({' '.join(value.words)})"
        case "file":
            return f"{label}:_files"
        case "any":
            return f"{label}: "
        case kind:
            return f"{label}:_mlx_run_words {kind}"


def _zsh_text(text: str) -> str:
    for character in "\\[]:":
        text = text.replace(character, f"\\{character}")
    return text


def fish(commands: Sequence[Command]) -> str:
    """A script for fish."""
    lines = []
    for command in commands:
        lines.append(_fish("-n __fish_use_subcommand", f"-a {command.name}", command.help))
        here = f"-n '__fish_seen_subcommand_from {command.name}'"
        if command.operand is not None:
            lines.append(_fish(here, _fish_value(command.operand), ""))
        for option in command.options:
            spelled = " ".join(f"-l {f[2:]}" if f.startswith("--") else f"-s {f[1:]}" for f in option.flags)
            value = f" -r {_fish_value(option.value)}" if option.value is not None else ""
            lines.append(_fish(here, spelled + value, option.help))
    return _FISH.format(lines="\n".join(lines))


def _fish(condition: str, what: str, text: str) -> str:
    quoted = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"complete -c mlx-run {condition} {what}" + (f" -d '{quoted}'" if text else "")


def _fish_value(value: Value) -> str:
    match value.kind:
        case "words":
            return f"-f -a '{' '.join(value.words)}'"
        case "file":
            return "-F"
        case "any":
            return "-f"
        case kind:
            return f"-f -a '(mlx-run completion --words {kind} 2>/dev/null)'"
