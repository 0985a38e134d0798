"""Pages of the site that are not in docs/: those of the repository, the examples, the command line, the modules.

A hook of mkdocs (see mkdocs.yml). Links are right in the repository, and are led to the site's pages here.
"""

import ast
import logging
import os
import posixpath
import re
from pathlib import Path
from typing import Any

import typer
import typer.cli
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
DOCS = "docs/"
# Pages of the site by their files in the repository.
PAGES = {
    "README.md": "index.md", "ARCHITECTURE.md": "architecture.md", "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md", "benchmarks/README.md": "benchmarks.md",
    "datasets/README.md": "datasets.md", "weights/README.md": "weights.md",
    **{f"examples/{file.name}": f"examples/{file.stem}.md" for file in (ROOT / "examples").glob("*.py")},
}  # fmt: skip
FILES = {page: file for file, page in PAGES.items()}
CLI, MODULES = "reference/cli.md", "reference/modules.md"
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]*)")
log = logging.getLogger("mkdocs.hooks.site_pages")


def on_files(files: Files, config: Any) -> Files:
    """Add what is not in docs/."""
    for name, page in PAGES.items():
        text = (ROOT / name).read_text()
        shown = f"# {name}\n\n```python\n{text}```\n" if name.endswith(".py") else text
        files.append(File.generated(config, page, content=shown))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in what is generated, and lead links of the repository to pages of the site."""
    name = page.file.src_uri
    made = {CLI: command_line, MODULES: modules}.get(name)
    file = FILES.get(name, DOCS + name)
    # Not in code: nothing there is a link.
    parts = re.split(r"(```.*?```|`[^`\n]*`)", markdown, flags=re.S)
    parts[::2] = [LINK.sub(lambda link: led(link[1], file, name), part) for part in parts[::2]]
    return "".join(parts) + (made() if made else "")


def led(target: str, file: str, page: str) -> str:
    """A relative link of a file of the repository, as its page on the site has it."""
    found = posixpath.normpath(posixpath.join(posixpath.dirname(file), target))
    on_site = PAGES.get(found, found.removeprefix(DOCS) if found.startswith(DOCS) else None)
    if on_site is None:
        log.warning("%s: link to %s, which is not on the site: name it in PAGES, or in code font", file, target)
        return target
    return os.path.relpath(on_site, posixpath.dirname(page) or ".")


def command_line() -> str:
    """All commands and options, as Typer tells of them."""
    from detguard.cli.app import app

    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="detguard")
    shown = typer.cli.get_docs_for_click(obj=command, ctx=context, name="detguard")
    return shown[shown.index("\n## ") :]


def modules() -> str:
    """A table of what every module says that it is for."""
    rows = [
        f"| `{file.relative_to(ROOT).as_posix()}` | {first} |"
        for file in sorted((ROOT / "detguard").rglob("*.py"))
        if (first := (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n\n")[0].replace("\n", " "))
    ]
    return "\n".join(["| module | what it is for |", "|---|---|", *rows, ""])
