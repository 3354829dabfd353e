"""Build hook: make `pip install -e .` see the five top-level folders as `fleetfed.*`.

hatchling refuses an editable install when a source path is renamed, so the editable install points at
`.hatch/editable/fleetfed/`, a folder of links that this hook makes. The links stand under `.hatch/` because
hatchling never walks that folder: anywhere else it would follow them and leave the real packages out of the wheel.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class EditableLinks(BuildHookInterface):  # type: ignore[type-arg]
    """Links `.hatch/editable/fleetfed/<role>` to `<role>/` before an editable build."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Create the links when ``version`` is ``editable``; a regular wheel needs none."""
        del build_data
        if version != "editable":
            return
        root = Path(self.root)
        for source, target in self.build_config.sources.items():
            link = root / ".hatch" / "editable" / target.rstrip("/")
            link.parent.mkdir(parents=True, exist_ok=True)
            wanted = Path("../../..") / source.rstrip("/")
            if link.is_symlink():
                if link.readlink() == wanted:
                    continue
                link.unlink()
            link.symlink_to(wanted, target_is_directory=True)
