"""Files that appear whole or not at all, and names of files fit to publish."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it becomes `path` on success and is deleted on failure."""
    path = Path(path)
    # Beside the target: only within one file system is a rename atomic. With its suffix: savefig goes by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(content: dict, path: Path) -> None:
    """Write `content` to `path`, whole or not at all; JSON has no NaN and no infinity, they become null."""
    content = json.loads(json.dumps(content), parse_constant=lambda name: None)
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def public_name(name: str) -> str:
    """`name` without the folders of this machine: of a path, its last part; also in the form --flag=path."""
    flag, equals, value = name.rpartition("=")
    path = Path(value).expanduser()
    return f"{flag}{equals}{path.resolve().name}" if value and path.exists() else name
