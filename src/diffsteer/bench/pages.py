"""One Markdown page per method from its docstring, with what ``diffsteer bench methods`` measured."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shutil
from pathlib import Path
from typing import Any

from diffsteer.bench.catalogue import suffix, table
from diffsteer.bench.trials import method_of
from diffsteer.files import check_writable, write_text
from diffsteer.methods import entry, list_methods, list_optimizers


def write_pages(out: Path, results: Path | None = None) -> list[Path]:
    """Write ``<name>.md`` per registered method, and ``README.md``, their index, into ``out``.

    Parameters
    ----------
    results : Path, optional
        A folder that :func:`diffsteer.bench.catalogue.bench_methods` wrote: its lines and pictures are shown.
    """
    check_writable(out / "README.md")
    measured: dict[str, Any] = {"lines": []}
    if results is not None:
        measured = json.loads((results / "methods.json").read_text(encoding="utf-8"))
    written = []
    for name in (*list_methods(), *list_optimizers()):
        for task in {line["task"] for line in measured["lines"] if method_of(line["trial"]) == name}:
            assert results is not None
            shutil.copyfile(results / f"samples-{name}{suffix(task)}.png", out / f"{name}{suffix(task)}.png")
        written.append(write_text(out / f"{name}.md", page(name, measured)))
    index = [
        "# Methods",
        "",
        "| name | method | class | paper | evaluations / step | takes | runs in |",
        "|---" * 7 + "|",
    ]
    for name in (*list_methods(), *list_optimizers()):
        found = entry(name)
        cells = (f"`{found.cls.__name__}`", found.paper, f"{found.nfe:g}", ", ".join(found.takes), found.where)
        index.append(f"| [{name}]({name}.md) | {found.title} | {' | '.join(cells)} |")
    text = "\n".join([*index, "", "Made by `diffsteer bench methods --pages docs/methods`.", ""])
    written.append(write_text(out / "README.md", text))
    return written


def page(name: str, measured: dict[str, Any]) -> str:
    """The page of one method, with its lines of ``methods.json``."""
    found = entry(name)
    values = [f"{f.name}={_default(f)}" for f in dataclasses.fields(found.cls)]  # type: ignore[arg-type]
    lines = [
        f"# {found.title}",
        "",
        f"`ds.{found.cls.__name__}`, short name `{name}`, {found.nfe:g} evaluations per step with its defaults.",
        "",
        "```python",
        f"ds.{found.cls.__name__}({', '.join(values)})",
        "```",
        "",
        markdown(inspect.getdoc(found.cls) or ""),
        "",
    ]
    own = [line for line in measured["lines"] if method_of(line["trial"]) == name]
    if own:
        lines += ["## Measured", ""]
    for task in dict.fromkeys(line["task"] for line in own):
        rows = [line for line in own if line["task"] == task]
        trials = list(dict.fromkeys(line["trial"] for line in rows))
        lines += [f"On {measured['subjects'][task]}, {measured['tasks'][task]}: `diffsteer bench methods`.", ""]
        lines += [*table(rows, named=len(trials) > 1), ""]
        for trial in trials:
            lines += [
                f"`{trial}`: {measured['findings'][trial]}" if len(trials) > 1 else measured["findings"][trial],
                "",
            ]
        lines += [f"![samples]({name}{suffix(task)}.png)", ""]
    return "\n".join([*lines, "## Paper", "", "```bibtex", found.bibtex, "```", ""])


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return "..." if field.default is dataclasses.MISSING else repr(field.default)


def markdown(docstring: str) -> str:
    """A numpydoc docstring as Markdown that GitHub renders."""
    text = re.sub(r":(?:class|meth|func|mod|data):`~?([^`]+)`", r"`\1`", docstring).replace("``", "`") + "\n\n"
    text = re.sub(r":math:`([^`]+)`", r"$`\1`$", text)
    text = re.sub(r"^\.\. math::[ ]*(.*)\n((?:    .*\n|\n(?=    ))*)", _math, text, flags=re.M)
    text = re.sub(r"^(=+ =[= ]*)\n((?:.+\n)+)", r"```\n\1\n\2```\n", text, flags=re.M)  # a table stays as it is set
    text = re.sub(r"^(>>> (?:.+\n)+)", r"```python\n\1```\n", text, flags=re.M)
    text = re.sub(r"^(\w[\w ]*)\n-{3,}$", r"## \1\n", text, flags=re.M)
    head, *sections = re.split(r"^(?=## )", text, flags=re.M)
    return "".join([head, *(_parameters(s) if s.startswith("## Parameters") else s for s in sections)]).strip()


def _math(found: re.Match[str]) -> str:
    first, *more = inspect.cleandoc(found[2]).split("\n\n")  # equations, each on a line of its own
    if found[1]:  # begun beside the directive, and maybe continued below it
        first = " ".join([found[1], *first.split("\n")]).strip()
    body = " \\\\\n".join([first, *more])
    if more or "&" in body:
        body = f"\\begin{{aligned}}\n{body}\n\\end{{aligned}}"
    return f"```math\n{body}\n```\n"


def _parameters(section: str) -> str:
    """``name : type`` lines with indented text as a list."""
    return re.sub(
        r"^(\w[\w, ]*) ?: (.*)\n((?:    .*\n?)*)",
        lambda m: f"- `{m[1].strip()}` ({m[2]}): " + " ".join(m[3].split()) + "\n",
        section,
        flags=re.M,
    )


__all__ = ["markdown", "page", "write_pages"]
