"""What an enrolled device remembers of its enrolment: apart from `enroll`, which only enrolled devices load."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fleetfed.shared.errors import ConfigError
from fleetfed.shared.files import write_atomic

NOTES: Final = "enrol.toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Notes:
    """``enrol.toml``: where to renew (empty: by files alone), and the name of the hardware (empty: the machine's)."""

    url: str = ""
    hardware: str = ""

    @classmethod
    def load(cls, directory: Path) -> Notes:
        """Read what `save` wrote; an identity that was issued has none.

        Raises:
            ConfigError: it is damaged.
        """
        path = directory / NOTES
        try:
            table = tomllib.loads(path.read_text())
        except FileNotFoundError:
            return cls()
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{path}: {error}") from error
        return cls(url=str(table.get("url", "")), hardware=str(table.get("hardware", "")))

    def save(self, directory: Path) -> None:
        """Write them."""
        lines = (f"url = {json.dumps(self.url)}", f"hardware = {json.dumps(self.hardware)}", "")
        write_atomic(directory / NOTES, "\n".join(lines).encode())
