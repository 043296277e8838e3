"""Where the project is found: its repository's address, from pyproject.toml, and links into it."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

from crt_lib.files import InputError


@dataclass(frozen=True)
class Address:
    """The repository's address and the version that is tagged there."""

    url: str
    version: str

    @classmethod
    def read(cls, checkout: Path) -> "Address":
        """That of a checkout; raises InputError where its pyproject.toml does not say it."""
        path = checkout / "pyproject.toml"
        try:
            project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
            url, version = project["urls"]["Repository"], project["version"]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"{path} gives no address: {error!r}. It needs [project] version and "
                "[project.urls] Repository; run in a checkout."
            ) from error
        if not url.startswith("https://github.com/"):
            raise InputError(
                f"{path} has Repository = {url!r}; Colab and nbviewer open https://github.com/..."
            )
        return cls(url.rstrip("/").removesuffix(".git"), version)

    @property
    def archive(self) -> str:
        """The address of the tagged version, `v` and its number, as a file to unpack."""
        return f"{self.url}/archive/v{self.version}.tar.gz"

    @property
    def folder(self) -> str:
        """The folder that unpacking the archive makes."""
        return f"{self.url.rpartition('/')[2]}-{self.version}"

    @property
    def wheel(self) -> str:
        """The file name of the version's wheel."""
        return f"crt_lm-{self.version}-py3-none-any.whl"

    def colab(self, notebook: str) -> str:
        """The link that opens `notebook`, such as `01_data`, in Colab."""
        return f"https://colab.research.google.com/{self._file(notebook)}"

    def nbviewer(self, notebook: str) -> str:
        """The link that shows `notebook` with its outputs."""
        return f"https://nbviewer.org/{self._file(notebook)}"

    def _file(self, notebook: str) -> str:
        owner = self.url.removeprefix("https://github.com/")
        return f"github/{owner}/blob/main/notebooks/{notebook}.ipynb"
