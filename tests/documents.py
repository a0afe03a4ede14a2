"""What the project's documents tell people to type."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "deploy").rglob("*.md")]
)


@dataclass(frozen=True, slots=True)
class Block:
    """One block of shell commands."""

    document: str
    text: str

    @property
    def commands(self) -> list[str]:
        """One a line, without comments."""
        joined = self.text.replace("\\\n", " ").splitlines()
        lines = [re.sub(r"\s+# .*", "", line).strip() for line in joined]
        return [re.sub(r"\s+", " ", line) for line in lines if line and not line.startswith("#")]

    @property
    def name(self) -> str:
        """Document and first command."""
        return f"{self.document}: {self.commands[0].replace('.venv/bin/', '')}"


def blocks() -> list[Block]:
    """Of all documents."""
    found = []
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        found += [Block(document, body) for body in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)]
    return found


def block(document: str, begins: str) -> Block:
    """The one whose first command is this, or else begins with it."""
    name, every = f"{document}: {begins}", blocks()
    (found,) = [each for each in every if each.name == name] or [each for each in every if each.name.startswith(name)]
    return found
