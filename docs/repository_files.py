"""Hook of mkdocs: files of the repository that pages link to (`../examples/own_cnn.py`) become part of the site."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PLACE = "repository"
"""Folder of the site that holds them."""
LINK = re.compile(r"\]\(\.\./([\w./-]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every file that some page links to and that lies beside the documentation."""
    pages = [file.content_string for file in files.documentation_pages()]
    for name in sorted({name for page in pages for name in LINK.findall(page)}):
        files.append(File.generated(config, f"{PLACE}/{name}", content=(ROOT / name).read_bytes()))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Let links lead there."""
    return LINK.sub(rf"]({PLACE}/\1)", markdown)
