"""Authorities and certificates for tests, as files."""

from __future__ import annotations

from pathlib import Path

import trustme


class Pki:
    """One authority with its certificate in ``ca``."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name, self._authority = folder, name, trustme.CA(organization_name=name)
        folder.mkdir(parents=True, exist_ok=True)
        self.ca = str(folder / f"{name}-ca.pem")
        self._authority.cert_pem.write_to_path(self.ca)

    def issue(self, *identities: str, file: str = "server") -> tuple[str, str]:
        """Files with a new certificate and its key; those of before, if there are any, are replaced in one step."""
        made = self._authority.issue_cert(*identities, common_name=self._name)
        paths = []
        for kind, blob in (
            ("cert", b"".join(part.bytes() for part in made.cert_chain_pems)),
            ("key", made.private_key_pem.bytes()),
        ):
            path = self._folder / f"{self._name}-{file}-{kind}.pem"
            scratch = path.with_suffix(".new")
            scratch.write_bytes(blob)
            scratch.replace(path)
            paths.append(str(path))
        return paths[0], paths[1]
