"""Hook of mkdocs: links from a page to files of the repository, which the site does not contain.

On the site such a link becomes its text. A link to a file that does not exist is a warning, and with it an error of
`mkdocs build --strict`.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"\[([^\]]*)\]\((\.\./[^)\s]*)\)")
log = logging.getLogger("mkdocs.hooks.docs_links")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    folder = Path(config.docs_dir)

    def text_of(link: re.Match[str]) -> str:
        if not (folder / link[2].partition("#")[0]).exists():
            log.warning("%s: the link to %s leads to no file of the repository", page.file.src_path, link[2])
        return link[1]

    return LINK.sub(text_of, markdown)
